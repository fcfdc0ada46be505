import json

import pytest
import torch
from standin import VOCABULARY, make_config

from pynar import checkpoint
from pynar.models import build
from pynar.training import train

SIZES = {
    "source_vocabulary": VOCABULARY,
    "target_vocabulary": VOCABULARY,
    "dim": 16,
    "ffn_dim": 32,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
}


# Small, and with its phases in sight.
FLOWSEQ = {
    "posterior_layers": 1,
    "flow_steps": [1, 1],
    "flow_ffn_dim": 8,
    "posterior_updates": 2,
    "kl_warmup_updates": 2,
}


RECURRENT = {"network": "rnn", "flow_network": "rnn", "positions": "none", "latent_dropout": 0.2}


def make(name):
    torch.manual_seed(0)
    model, _, variant = name.partition("-")
    fields = FLOWSEQ if model == "flowseq" else {}
    return build({"model": model, **SIZES, **fields, **(RECURRENT if variant else {})})


@pytest.mark.parametrize("name", ["autoregressive", "cmlm", "nat", "flowseq", "flowseq-rnn"])
def test_a_resumed_run_is_the_uninterrupted_one_and_loads(data, tmp_path, name):
    train(make(name), data, tmp_path / "whole", make_config(max_updates=5))
    for end in (2, 5):
        train(make(name), data, tmp_path / "parts", make_config(max_updates=end))
    whole, parts = (checkpoint.load_weights(tmp_path / n / "last") for n in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)
    model, tokenizer = checkpoint.load_model(tmp_path / "parts/best")
    assert not model.training and tokenizer.target_size == VOCABULARY
    assert model.config == make(name).config


def test_student_takes_all_it_shares_with_the_teacher(data, tmp_path, capsys):
    train(make("autoregressive"), data, tmp_path / "teacher", make_config(max_updates=1))
    config = make_config(max_updates=1, lr=1e-12, warmup_init=0.0)
    student = make("cmlm")
    train(student, data, tmp_path / "student", config, init_from=tmp_path / "teacher/last")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("initialised"))
    left = line.split("left as they were: ")[1].split(", ")
    assert left and all(part.startswith("length.") for part in left)


def test_a_validation_logs_what_the_model_says_of_itself(data, tmp_path):
    train(make("flowseq"), data, tmp_path, make_config(max_updates=4, validate_every=2))
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    found = [line for line in lines if line["event"] == "valid"]
    names = {"kl_token", "posterior_token", "prior_sample_token", "prior_token"}
    names |= {"posterior_mean_std", "posterior_std"}
    assert len(found) == 2
    assert all(names | {"logdet_0", "logdet_1", "kl"} <= line.keys() for line in found)
    # On the same noise, but here of the first batch alone.
    assert found[1]["kl_token"] == pytest.approx(found[1]["kl"], rel=0.2)
