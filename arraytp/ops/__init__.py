"""Operations on arrays: pure functions, each forward beside its hand-written adjoint."""
