"""Distil a pretrained diffusers UNet into a one-step student.

    accelerate launch examples/distill.py --config examples/configs/ddpm-cifar10.yaml [--field value ...]

`--help` explains every field.
"""

import sys

from cm_diffusers.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
