"""`pynar export`."""

from __future__ import annotations

import argparse

import pynar
from pynar.decoding.ctranslate2 import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint of an autoregressive model")
    parser.add_argument("--output", required=True, help="directory of the exported model")
    parser.add_argument(
        "--quantization",
        metavar="TYPE",
        help="how weights are stored, e.g. int8 or float16; in fp32 if not given",
    )


def run(options: argparse.Namespace) -> None:
    translator = pynar.load(options.model)
    export(
        translator.model, translator.tokenizer, options.output, quantization=options.quantization
    )
    print(f"{options.output}: a CTranslate2 model, in {options.quantization or 'float32'}")
