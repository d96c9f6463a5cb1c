"""Model folders with random damage: refused with a sentence and exit 4, or the very model that was written."""

import json
import shutil
from pathlib import Path

import fuzzing
import pytest
import torch
from fuzzing import examples, outcome, unchanged, write
from hypothesis import given
from hypothesis import strategies as st

import comp_cli
from comp_cli.checkpoint import loading
from comp_cli.checkpoint.weight_files import check_checkpoint
from comp_cli.cli.output import Output
from comp_cli.errors import CompError
from comp_cli.models.dense import open_dense


class Box:
    """A model folder that is damaged again and again; weights are linked, not copied."""

    def __init__(self, source: Path, folder: Path):
        self.folder = folder
        shutil.copytree(source, folder)
        (folder / "comp_report.json").unlink(missing_ok=True)
        self.whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def json(self, name: str):
        return json.loads(self.whole[name])

    def with_(self, name: str, content, do):
        """The outcome of `do(folder)` where one file holds something else."""
        write(self.folder / name, content)
        try:
            with unchanged(self.folder):
                return outcome(lambda: do(self.folder))
        finally:
            (self.folder / name).unlink()
            if name in self.whole:
                (self.folder / name).write_bytes(self.whole[name])


@pytest.fixture(scope="module")
def dense_box(tiny_folder, tmp_path_factory):
    return Box(tiny_folder, tmp_path_factory.mktemp("fuzz") / "dense")


@pytest.fixture(scope="module")
def compact_box(compact_folder, tmp_path_factory):
    return Box(compact_folder, tmp_path_factory.mktemp("fuzz") / "compact")


@pytest.fixture(scope="module")
def honest(compact_folder, inputs):
    return scores(comp_cli.load(compact_folder), inputs)


def scores(model, inputs):
    with torch.inference_mode():
        return model(**inputs).itm_score


def opened(folder: Path):
    return open_dense(str(folder), Output("quiet"), text_tokens=12)


@examples(250)
@given(data=st.data())
def test_fuzz_configs_of_dense_models(dense_box, inputs, data):
    """What comp makes of a config is what the stock class makes of it, or a refusal."""

    def compared(folder: Path):
        dense = opened(folder)
        stock, own = loading.load_model(folder), dense.runtime(dense.plan)
        torch.testing.assert_close(scores(own, inputs), scores(stock, inputs), atol=1e-4, rtol=1e-3)

    config = data.draw(fuzzing.damaged(dense_box.json("config.json")))
    found = dense_box.with_("config.json", config, compared)
    assert found is None or found.exit_code == 4


@examples(250)
@given(data=st.data())
def test_fuzz_plans_are_refused_or_change_nothing(compact_box, honest, inputs, data):
    """A plan that loads and lies is the worst that can happen."""
    config = compact_box.json("config.json")
    block = data.draw(fuzzing.damaged(config["comp"]))
    found = compact_box.with_("config.json", config | {"comp": block}, comp_cli.load)
    if isinstance(found, CompError):
        assert found.exit_code == 4
    elif same_keeps(block, config["comp"]):
        assert torch.equal(scores(found, inputs), honest)
    else:
        assert scores(found, inputs).isfinite().all()


def same_keeps(block, written) -> bool:
    """Fewer kept tokens, or rows that score them, are a plan like any other: only the hashes of the report can tell."""

    def ranked(found):
        return [
            (tower["score_rows"], tower.get("fuse"), [layer["keep"] for layer in tower["layers"]]) for tower in found["towers"]
        ]

    return ranked(block) == ranked(written)


@examples(60)
@given(data=st.data())
def test_fuzz_configs_of_compact_models(compact_box, data):
    config = data.draw(fuzzing.damaged(compact_box.json("config.json")))
    found = compact_box.with_("config.json", config, comp_cli.load)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(150)
@given(data=st.data())
def test_fuzz_bytes_of_configs(dense_box, data):
    content = data.draw(fuzzing.torn(dense_box.whole["config.json"]))
    found = dense_box.with_("config.json", content, comp_cli.load)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(250)
@given(data=st.data())
def test_fuzz_headers_of_weights(dense_box, data):
    weights = dense_box.whole["model.safetensors"]
    size = int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    text = json.dumps(data.draw(fuzzing.damaged(header))).encode("utf-8", "surrogatepass")
    length = data.draw(st.sampled_from([len(text), len(text) + 1, 0, 2**32, 2**64 - 1]) | st.just(len(text)))
    found = dense_box.with_("model.safetensors", length.to_bytes(8, "little") + text + body, comp_cli.load)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(400)
@given(data=st.data())
def test_fuzz_shard_indices(dense_box, data):
    names = st.sampled_from(["model.safetensors", "../x.safetensors", "config.json", "", ".", "a" * 300, "/etc/passwd"])
    whole = {"metadata": {"total_size": 1}, "weight_map": {"itm_head.weight": "model.safetensors"}}
    index = data.draw(
        st.one_of(
            fuzzing.damaged(whole),
            st.dictionaries(st.text(max_size=4), names | fuzzing.VALUES, max_size=4).map(
                lambda found: whole | {"weight_map": found}
            ),
            fuzzing.torn(json.dumps(whole).encode()),
        )
    )

    def check(folder: Path):
        (folder / "model.safetensors").rename(folder / "m.safetensors")
        try:
            return check_checkpoint(folder, allow_pickle=True)
        finally:
            (folder / "m.safetensors").rename(folder / "model.safetensors")

    found = dense_box.with_("model.safetensors.index.json", index, check)
    assert isinstance(found, CompError) and found.exit_code == 4  # model.safetensors is not there


@examples(120)
@given(data=st.data(), name=st.sampled_from(["processor_config.json", "tokenizer_config.json"]))
def test_fuzz_processor_files(dense_box, data, name):
    content = data.draw(fuzzing.damaged(dense_box.json(name)))
    found = dense_box.with_(name, content, opened)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(80)
@given(data=st.data())
def test_fuzz_tokenizers(dense_box, data):
    whole = dense_box.whole["tokenizer.json"]
    content = data.draw(fuzzing.damaged(json.loads(whole)) | fuzzing.torn(whole))
    found = dense_box.with_("tokenizer.json", content, opened)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(60)
@given(data=st.data(), name=st.sampled_from(["preprocessor_config.json", "generation_config.json", "special_tokens_map.json"]))
def test_fuzz_files_that_were_not_there(dense_box, data, name):
    keys = st.sampled_from(["size", "auto_map", "image_mean", "max_length", "image_processor_type", "pad_token", "eos_token"])
    content = data.draw(st.dictionaries(keys, fuzzing.VALUES, max_size=3) | st.binary(max_size=30))
    found = dense_box.with_(name, content, opened)
    assert not isinstance(found, CompError) or found.exit_code == 4


@examples(60)
@given(data=st.data())
def test_fuzz_reports(compact_box, data):
    whole = {"schema_version": 1, "files": {"config.json": {"bytes": 3, "sha256": "0" * 64}}}
    content = data.draw(fuzzing.damaged(whole) | fuzzing.torn(json.dumps(whole).encode()))
    found = compact_box.with_("comp_report.json", content, loading.check_report)
    assert not isinstance(found, CompError) or found.exit_code == 4
