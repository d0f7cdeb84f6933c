"""Build an experiment from a config or its plan."""

from arraytp import optim
from arraytp.backend import Backend
from arraytp.config import Config
from arraytp.data.division import TRAIN, VALIDATION, divide
from arraytp.fast.device import fast_engine
from arraytp.fast.graphs import Graphs
from arraytp.fast.parallel import asked_threads
from arraytp.launcher import threads_of
from arraytp.model.initialise import make_network
from arraytp.model.passes import Engine
from arraytp.model.plain import Plain
from arraytp.ops.kernels import has_kernels
from arraytp.ranks import ALONE, PARTS, Ranks
from arraytp.rules import RULES
from arraytp.training.experiment import Experiment
from arraytp.training.plan import Plan, make_loader, plan


def build(config: Config, backend: Backend | None = None, plain: bool = False) -> Experiment:
    """Build an experiment in its initial state.

    `backend` overrides the one that the config names. With `plain`, the experiment computes with the primitives of
    `arraytp.model.plain`. Raises UserError as `plan` does, and also if the data is damaged.
    """
    return build_planned(plan(config, backend), plain)


def build_planned(planned: Plan, plain: bool = False, ranks: Ranks = ALONE) -> Experiment:
    """Build the experiment of a plan, or this rank's share of it; otherwise as `build`."""
    config, backend = planned.config, planned.backend
    backend.use_tf32(config.tf32)
    network = make_network(planned.blocks, config.network.init, config.seed, config.dtype, backend)
    rule, engine = RULES[config.rule.name], fast_engine(backend, asked_threads() or threads_of(ranks))
    engine.deal_among(ranks)
    graphs = Graphs(engine, config.cuda_graphs and not plain and has_kernels(network.weights[0]))
    first: Engine = Plain(backend) if plain else engine
    together = config.train.exact and not plain and backend.on_host and _goes_together(planned)
    dataset, held, evaluated = planned.dataset, config.train.validation, config.train.eval_batch_size
    source, share = divide(dataset, held) if held else dataset, (ranks.rank, ranks.size)
    return Experiment(
        plan=planned,
        network=network,
        rule=rule,
        rule_state=rule.init_state(config.rule, network, config.seed, backend),
        optimizer_state=optim.init_optimizer(config.optimizer, network.parameters()),
        workspace=engine,
        engines=(
            tuple(first.beside() for _ in range(PARTS // ranks.size))
            if config.train.exact and not together
            else (first,)
        ),
        train_loader=make_loader(planned, source, TRAIN, config.train.batch_size, training=True, share=share),
        test_loader=make_loader(planned, dataset, planned.test_split, evaluated, training=False, share=share),
        validation_loader=(
            make_loader(planned, source, VALIDATION, evaluated, training=False, share=share) if held else None
        ),
        graphs=graphs,
        ranks=ranks,
        together=together,
    )


def _goes_together(planned: Plan) -> bool:
    """Tell whether parts of a batch can be computed at once: all blocks are dense, and rule and comparison allow it.

    Rules that train feedback do not, because they scale the gradients of each part themselves.
    """
    dense, rule = all(block.window is None for block in planned.blocks), RULES[planned.config.rule.name]
    return dense and rule.by_samples and rule.feedback is None and "gnt" not in planned.config.compare.against
