"""The commands, one module each; `arraytp.cli` imports them when they are called."""
