"""A LLaVA of three billion parameters under a limit on its address space: analysed, and pruned twice, layer by layer.

    python benchmarks/larger_than_memory.py --work /somewhere/with/40/GB                 # the whole, about an hour on one core
    python benchmarks/larger_than_memory.py --work /tmp/x --size tiny                    # the same in a minute

Weights are random and bf16, in files of 0.9 GB: a CLIP-L tower of 224 pixels, a Llama of 42 layers, 2560 wide with 3072
channels, and 256,000 words. Every command runs in a process of its own under `ulimit -v`: what Python and its libraries map
before anything is opened, and ROOM (1 GiB) more. Printed and written to OUTPUT.jsonl: seconds, and what was resident and mapped
at most above that. The folders are removed, each when the next does not need it.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from comp_cli.checkpoint.header_check import on_meta
from comp_cli.commands.bench import machine
from comp_cli.files.shards import ShardWriter

SIZES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {  # vision tower, language model
    "3b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 14},
        {"hidden_size": 2560, "intermediate_size": 3072, "num_hidden_layers": 42, "num_attention_heads": 20}
        | {"num_key_value_heads": 5, "head_dim": 128, "vocab_size": 256000},
    ),
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"image_size": 48, "patch_size": 8},
        {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 36, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "head_dim": 32, "vocab_size": 60000},
    ),
}
WORDS = "a an the is are of in how what colour many there left right above below red blue green yellow circle square".split()
IMAGE = "<image>"
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + " "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)


def config_of(size: str, layers: int | None = None) -> transformers.LlavaConfig:
    """layers: of the language model, in the place of its own number."""
    vision, text = SIZES[size]
    text = text | ({} if layers is None else {"num_hidden_layers": layers})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(
            **text, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        image_token_index=3,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.bfloat16
    return config


def make(folder: Path, size: str, layers: int | None = None) -> None:
    """A checkpoint of random weights, of which one tensor at a time is in memory."""
    folder.mkdir(parents=True)
    config = config_of(size, layers)
    config.save_pretrained(folder)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in on_meta(transformers.LlavaForConditionalGeneration, config).state_dict().items()
    }
    writer = ShardWriter(
        folder, {name: ("BF16", shape) for name, shape in shapes.items()}, shard=900 * 10**6 if size == "3b" else 10**7
    )
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, weight(name, shape, generator))
    writer.close()
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", IMAGE, "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([IMAGE])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    side = config.vision_config.image_size
    transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        chat_template=CHAT,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    ).save_pretrained(folder)


def weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms of one, biases of nothing, and matrices that keep the size of what they read."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    scale = 1.0 if "embed_tokens" in name else 1 / math.sqrt(math.prod(shape[1:]))
    found = torch.empty(shape, dtype=torch.bfloat16)
    for rows in found.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * scale)
    return found


# One command ----------------------------------------------------------------------------------------------------------------

CHILD = """
import json, resource, sys
from pathlib import Path
import torch, transformers, comp_cli
import comp_cli.cli.app
from comp_cli.commands import analyze, prune, prune_streamed, prune_tokens
from comp_cli.cli.app import app
torch.set_num_threads(1)
room, words = int(sys.argv[1]), sys.argv[2:]

def now(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

mapped, resident = now("VmPeak"), now("VmHWM")
resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))
try:
    app(words)
finally:
    print(json.dumps({"mapped": now("VmPeak") - mapped, "resident": now("VmHWM") - resident, "base": [mapped, resident]}))
"""


def run(words: list[str], room: int) -> dict[str, Any]:
    """`comp WORDS` with `room` bytes more address space than Python and its libraries take: seconds, and bytes above them."""
    begin = time.time()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", CHILD, str(room), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"comp {' '.join(words)} failed:\n{done.stdout}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": words[0], "words": words[1:], "seconds": round(time.time() - begin, 1), "cpu": round(cpu, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, on a disk with three times their size")
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--layers", type=int, help="of the language model, for a shorter run (default: all)")
    parser.add_argument("--room", type=int, default=None, help="MiB (default: 1024, of tiny ones 128)")
    parser.add_argument("--only", default="analyze,tokens,comp")
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "larger_than_memory.jsonl")
    given = parser.parse_args()
    room = (given.room or (1024 if given.size == "3b" else 128)) << 20
    dense = given.work / f"llava-{given.size}"
    if not dense.exists():
        make(dense, given.size, given.layers)
    weights = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    print(
        f"{weights / 2**30:.2f} GiB of weights in {len(list(dense.glob('*.safetensors')))} files; {room >> 20} MiB may be used"
    )
    images = (config_of(given.size).vision_config.image_size // config_of(given.size).vision_config.patch_size) ** 2
    few = ["--num-samples", "4", "--stage-samples", "4", "--eval-samples", "2", "--batch-size", "2"]
    commands = {
        "analyze": ["analyze", str(dense)],
        "tokens": ["prune", str(dense), "--method", "vitcop", "--tokens", str(images // 4), "-o", str(given.work / "tokens")],
        "comp": ["prune", str(dense), "--method", "comp", "--ratio", "0.3", *few, "-o", str(given.work / "comp")],
    }
    for name in given.only.split(","):
        found = run(commands[name], room) | {
            "model": given.size,
            "weights": weights,
            "room": room,
            "machine": asdict(machine(torch.device("cpu"))),
        }
        print(
            f"{name}: {found['seconds']} s ({found['cpu']} s CPU), {found['resident'] >> 20} MiB resident and "
            f"{found['mapped'] >> 20} MiB mapped above Python's {found['base'][1] >> 20} and {found['base'][0] >> 20}"
        )
        found["words"] = [word.removeprefix(f"{given.work}/") for word in found["words"]]
        with given.output.open("a") as file:
            file.write(json.dumps(found) + "\n")
        if not given.keep:
            shutil.rmtree(given.work / name, ignore_errors=True)
    if not given.keep:
        shutil.rmtree(dense)


if __name__ == "__main__":
    main()
