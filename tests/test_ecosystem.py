"""Compact folders in the hands of other libraries: pipelines, PEFT, Trainer, torch.compile, sentence-transformers.

Each is used as on a dense folder, beside it as a control where that costs little, and without comp: numbers are compared with
`comp_cli.load`, or with the same model before.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from PIL import Image

import comp_cli

FEW = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
SHORT = FEW | {"num_samples": 4, "stage_samples": 2, "eval_samples": 2, "looks": 1}
TEXTS = ["a red circle", "two blue squares"]
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def folder(clip) -> Path:
    """A compact CLIP: heads, channels and tokens are gone."""
    return clip[0]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((48, 48), 60).convert("RGB")


@pytest.fixture(scope="module")
def given(folder, picture) -> transformers.BatchFeature:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return processor(images=[picture, picture.rotate(90)], text=TEXTS, padding=True, return_tensors="pt")


def remote(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModel.from_pretrained(folder, **REMOTE).eval()


def logits(model, given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits_per_image


def test_the_pipeline_of_siglip_answers_as_comp_does(tmp_path, picture, monkeypatch):
    """It pads texts to 64 tokens, whatever the tokenizer says."""
    monkeypatch.setattr(tiny, "TEXT", tiny.TEXT | {"max_position_embeddings": 64})
    dense = tiny.write("siglip", tmp_path / "dense")
    comp_cli.prune(dense, ratio=0.5, output=tmp_path / "compact", method="joint", **FEW)
    found = {}
    for side, how in (("dense", {}), ("compact", REMOTE)):
        pipe = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / side), **how)
        rows = pipe(picture, candidate_labels=TEXTS, hypothesis_template="{}")
        found[side] = [next(row["score"] for row in rows if row["label"] == text) for text in TEXTS]
    given = pipe.tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt")
    given |= pipe.image_processor(picture, return_tensors="pt")
    with torch.no_grad():
        right = comp_cli.load(tmp_path / "compact")(**given).logits_per_image.sigmoid()[0]
    assert found["compact"] == pytest.approx(right.tolist(), abs=1e-5) and found["compact"] != found["dense"]


@pytest.mark.parametrize("how", [{"ratio": 0.4} | SHORT, {"ratio": 0.3, "uniform": True} | SHORT, {"tokens": 9}])
def test_the_pipeline_of_decoders_writes_what_comp_writes(how, tmp_path, picture):
    """Parameters gone, or alike in every layer (a stock class, without remote code), or image tokens gone."""
    dense = tiny.write("llava", tmp_path / "dense")
    folder = tmp_path / "compact"
    comp_cli.prune(dense, output=folder, **how)
    remote = {} if "uniform" in how else REMOTE
    assert ("auto_map" in json.loads((folder / "config.json").read_text())) == bool(remote)
    pipe = transformers.pipeline("image-text-to-text", model=str(folder), **remote)
    tokenizer, rows = pipe.processor.tokenizer, pipe.model.get_output_embeddings().out_features
    silent = [row for row in range(rows) if not tokenizer.decode([row], skip_special_tokens=True).strip()]  # of no word as well
    asked, few = "user <image> a red circle a", {"max_new_tokens": 5, "suppress_tokens": silent, "do_sample": False}
    said = pipe(picture, text=asked, generate_kwargs=few)[0]["generated_text"]
    given = pipe.processor(images=picture, text=asked, return_tensors="pt")
    for model in (
        comp_cli.load(folder),
        transformers.AutoModelForImageTextToText.from_pretrained(folder, **remote),
        transformers.AutoModelForMultimodalLM.from_pretrained(folder, **remote),
    ):
        tokens = model.eval().generate(**given, **few)[0, given["input_ids"].shape[1] :]
        written = pipe.processor.decode(tokens, skip_special_tokens=True)
        assert written and said == f"{asked} {written}"


def test_peft_trains_an_adapter_and_merges_it(folder, given):
    peft = pytest.importorskip("peft", reason="peft is in the extra dev")
    model = remote(folder)
    before = logits(model, given)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(adapted.eval(), given), before)  # an adapter begins with nothing
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted.train()(**given, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = logits(adapted.eval(), given)
    assert not torch.allclose(tuned, before, atol=1e-3)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), given), tuned, atol=1e-4, rtol=1e-4)


def test_trainer_tunes_it_and_its_checkpoint_loads(folder, given, tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {name: value[index % 2] for name, value in given.items()} | {"return_loss": torch.tensor(True)}

    def batched(rows):
        return torch.utils.data.default_collate(rows) | {"return_loss": True}

    model = remote(folder)
    before = logits(model, given)
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 3, "learning_rate": 1e-3}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    options = transformers.TrainingArguments(str(tmp_path), **settings, **quiet)
    trainer = transformers.Trainer(model, options, train_dataset=Pairs(), data_collator=batched)
    assert trainer.train().training_loss > 0
    after = logits(model.eval(), given)
    assert not torch.allclose(after, before, atol=1e-3)
    for again in (comp_cli.load(tmp_path / "checkpoint-3"), remote(tmp_path / "checkpoint-3")):
        assert torch.equal(logits(again, given), after)


def test_it_compiles_as_one_graph(folder, given):
    model = remote(folder)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(whole, given), logits(model, given), atol=1e-5, rtol=1e-5)


def test_sentence_transformers_embeds_pictures_and_texts(folder, given, picture):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is in the extra dev")
    encoder = library.SentenceTransformer(str(folder), device="cpu", **REMOTE)
    with torch.no_grad():
        right = comp_cli.load(folder)(**given)
    for inputs, wanted in (([picture, picture.rotate(90)], right.image_embeds), (TEXTS, right.text_embeds)):
        found = torch.from_numpy(encoder.encode(inputs, normalize_embeddings=True))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
