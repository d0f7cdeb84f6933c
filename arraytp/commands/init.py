"""`arraytp init`: a commented config to start from."""

from pathlib import Path

import click

from arraytp.errors import UserError

STARTER = """\
# A config says everything about a run. docs/config.md lists every key. Train with: arraytp run FILE
data: {dataset: fashion-mnist-10k}    # part of the package; or the folder of a data set packed by `arraytp data pack`
network: {name: lenet}                # or fc-shallow, fc-deep, vgg, conv-imagenet, or your own `blocks`
optimizer: {name: adam, lr: 5e-4}     # or sgd with momentum and weight_decay
train: {epochs: 1, batch_size: 64}
compare: {every: 10}                  # measure the angle to BP's update every 10 steps

# Each variant is the config above with its own changes, and gets its own result folder.
variants:
  bp:
    rule: {name: bp}
  fa:
    rule: {name: fa}
  ldrl:
    rule:
      name: ldrl
      expected: true                  # feedback in closed form; false trains it with noise, as published
      feedback:
        iterations: [10, 80, 120]     # per batch, for each block but the first
        sigma: [0.3, 0.2, 0.2]
        optimizer: {name: sgd, lr: [4e-3, 2e-2, 3e-2], momentum: 0.9}
"""


@click.command(short_help="Write a commented config to start from.")
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Write a commented config to FILE, which must not exist yet: BP, FA and L-DRL on the embedded images."""
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(STARTER)
    except FileExistsError:
        raise UserError(f"{file}: exists already; give another name") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    click.echo(f"{file}: written; train it with: arraytp run {file}")
