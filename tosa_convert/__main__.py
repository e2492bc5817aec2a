"""``python -m tosa_convert``, which is also what torchrun starts: ``torchrun -m tosa_convert distill …``."""

from tosa_convert.cli.main import main

main()
