"""The models as the papers define them: blocks, networks, feedback modules, and the plain form of every primitive."""
