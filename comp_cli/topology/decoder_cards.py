"""Code in the cards of exported decoders that read images: greedy, with ONNX Runtime alone, and with transformers.js."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .card_examples import LONGEST, picture_of
from .client_cards import places
from .decoder_names import EMBEDS, FEATURES, KEPT, LABELS, WEIGHTS, WHERE

if TYPE_CHECKING:
    from transformers import GenerationConfig

WRITING = """
{asking}
seen = run("vision_encoder", {{{picture}}})
embeds = run("embed_tokens", {{"input_ids": ids}})["inputs_embeds"]
where = np.nonzero(ids[0] == {placeholder})[0]
embeds[0, where] = seen["image_features"].reshape(-1, embeds.shape[-1])
images = {images}
caches = (value for value in sessions["decoder_model_merged"].get_inputs() if value.name.startswith("past_key_values."))
past = {{value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}}
known, written = 0, []
while len(written) < {longest}:
    places = np.arange(known, known + embeds.shape[1])[None]{ahead}
    mask = np.ones((1, known + embeds.shape[1]), np.int64)  # of several prompts: zeros at the left of the shorter ones
    given = {{"inputs_embeds": embeds, "attention_mask": mask, "position_ids": places}}
    made = run("decoder_model_merged", past | images | given)
    written.append(int(made["logits"][0, -1].argmax()))
    if written[-1] in {ends}:
        break
    past = {{name.replace("present", "past_key_values"): value for name, value in made.items() if name != "logits"}}
    images = {{name: value[:, :0] for name, value in images.items()}}  # they were in the prompt
    embeds, known = run("embed_tokens", {{"input_ids": np.array([written[-1:]])}})["inputs_embeds"], mask.shape[1]
print(tokenizer.decode(written))
"""

NODE = """
import {{ readFileSync }} from "node:fs";
import * as ort from "onnxruntime-node";

{given}
const session = (name) => ort.InferenceSession.create(`./${{name}}.onnx`);
const [vision, embed, decoder] = await Promise.all(["vision_encoder", "embed_tokens", "decoder_model_merged"].map(session));
const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

const seen = await vision.run({{ {picture} }});
let {{ inputs_embeds }} = await embed.run({{ input_ids: whole(input_ids) }});
const where = input_ids.flatMap((id, place) => (id === {placeholder} ? [place] : []));
const feature = (i) => seen.image_features.data.subarray(i * {width}, (i + 1) * {width});
where.forEach((place, i) => inputs_embeds.data.set(feature(i), place * {width}));
const images = {images};
let past = {{}};
for (const {{ name, shape }} of decoder.inputMetadata.filter(({{ name }}) => name.startsWith("past_key_values.")))
  past[name] = new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
const written = [];
let known = 0;
while (written.length < {longest}) {{
  const places = Array.from({{ length: inputs_embeds.dims[1] }}, (_, i) => known + i{ahead});
  known += places.length;
  const given = {{ inputs_embeds, attention_mask: whole(Array(known).fill(1)), position_ids: whole(places) }};
  const {{ logits, ...present }} = await decoder.run({{ ...past, ...images, ...given }});
  written.push(logits.data.reduce((best, value, i, all) => (value > all[best] ? i : best), 0));
  if ({ends}.includes(written.at(-1))) break;
  past = {{}};
  for (const [name, value] of Object.entries(present)) past[name.replace("present", "past_key_values")] = value;
  for (const [name, {{ type, data }}] of Object.entries(images)) images[name] = new ort.Tensor(type, data.slice(0, 0), [1, 0]);
  ({{ inputs_embeds }} = await embed.run({{ input_ids: whole(written.slice(-1)) }}));
}}
console.log(JSON.stringify(written));
"""

PREPARED = """
// What a tokenizer and an image processor make of a prompt and a picture: input_ids (tokens), pixel_values (numbers).
const { input_ids, pixel_values } = JSON.parse(readFileSync("inputs.json"));
"""
AS_IT_IS = """
// What a tokenizer makes of a prompt, and a picture as it is: input_ids (tokens), image (rows of columns of red, green, blue).
const { input_ids, image } = JSON.parse(readFileSync("inputs.json"));
"""
FLOATS = 'pixel_values: new ort.Tensor("float32", Float32Array.from(pixel_values), [1, 3, {side}, {side}])'
BYTES = 'image: new ort.Tensor("uint8", Uint8Array.from(image.flat(2)), [1, image.length, image[0].length, 3])'

CLIENT = """
import {{ AutoProcessor, LlavaForConditionalGeneration, RawImage }} from "@huggingface/transformers";

const folder = {folder}
const processor = await AutoProcessor.from_pretrained(folder);
const model = await LlavaForConditionalGeneration.from_pretrained(folder);
const inputs = await processor(await RawImage.read("{picture}"), {text});
const written = await model.generate({{ ...inputs, max_new_tokens: {longest}, do_sample: false }});
console.log(processor.batch_decode(written.slice(null, [inputs.input_ids.dims.at(-1), null]), {{ skip_special_tokens: true }}));
"""

CACHES = (
    "Image tokens leave inside `decoder_model_merged`, so the layers hold different numbers of tokens, and a loop has to "
    "take the length of each cache from its own output, as below. onnxruntime-genai cannot: its cache has one length for "
    "all layers. The logits are those of the last token. Prompts of a batch are filled up at the left (otherwise logits are "
    "NaN), and have as many images each. `image_positions` says where image tokens are; it has no columns in a step."
)
IN_CLIENT = (
    "For transformers.js (4.x) as it is: `inputs_embeds` has columns behind the embeddings that say which tokens are of "
    "images, and the first entry of the cache counts the tokens that were seen, so that its length is right and padding is "
    "known in every step. config.json counts one layer more for it, and `num_additional_image_tokens` is what that client "
    "adds. One image a prompt, for its processor fills in no more. onnxruntime-genai cannot run these graphs: its cache has "
    "one length for all layers. `comp_cli.load_onnx` reads the other layout."
)


def expanded(prompt: str, image: str, tokens: int) -> str:
    """Python that says a prompt with a placeholder for each token of its image."""
    before, _, behind = prompt.partition(image)
    return f"{before!r} + {image!r} * {tokens} + {behind!r}"


def ends_of(generation: GenerationConfig | None) -> list[int]:
    """Tokens at which a text ends."""
    found = None if generation is None else generation.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def images_of(graph: Mapping[str, Any], form: str, by_name: str) -> str:
    """What a decoder takes of images, in code: `form` for the positions and for what the vision encoder hands on."""
    names = [name for name in (KEPT, LABELS, WEIGHTS) if name in graph["inputs"]]
    said = [f'"{WHERE}": {form}'] if WHERE in graph["inputs"] else []
    return "{" + ", ".join([*said, *(f'"{name}": {by_name.format(name)}' for name in names)]) + "}"


def asking(prompt: str, processor: Any, tokens: int) -> str:
    """Python that makes `ids` of a prompt with one image of so many tokens: with the tokenizer, or as numbers where the
    processor reads a prompt in another way."""
    from PIL import Image

    image, placeholder = processor.image_token, processor.image_token_id
    read = list(map(int, processor(images=[Image.new("RGB", (32, 32))], text=[prompt])["input_ids"][0]))
    if read == list(processor.tokenizer(prompt.replace(image, image * tokens, 1))["input_ids"]):
        return f"text = {expanded(prompt, image, tokens)}\nids = np.array([tokenizer.encode(text).ids])"
    first = read.index(placeholder)
    before, behind = read[:first], read[first + tokens :]
    return f"ids = np.array([{before} + [{placeholder}] * {tokens} + {behind}])  # what the processor makes of {prompt!r}"


def python_loop(
    document: Mapping[str, Any], generation: GenerationConfig | None, prompt: str, processor: Any, first_position: int
) -> str:
    """With NumPy."""
    graphs = document["graphs"]
    _, tokens, _ = graphs["vision_encoder.onnx"]["outputs"][FEATURES]["shape"]
    return WRITING.format(
        asking=asking(prompt, processor, tokens),
        picture=picture_of(document),
        placeholder=processor.image_token_id,
        images=images_of(graphs["decoder_model_merged.onnx"], "where[None]", 'seen["{}"].reshape(1, -1)'),
        ends=ends_of(generation),
        longest=LONGEST,
        ahead=f" + {first_position}" if first_position else "",
    )


def node_loop(document: Mapping[str, Any], generation: GenerationConfig | None, processor: Any, first_position: int) -> str:
    """With onnxruntime-node."""
    graphs, itself = document["graphs"], document["with_preprocessing"]
    seen = graphs["vision_encoder.onnx"]["inputs"]
    return NODE.format(
        given=(AS_IT_IS if itself else PREPARED).strip("\n"),
        picture=BYTES if itself else FLOATS.format(side=seen["pixel_values"]["shape"][-1]),
        width=graphs["embed_tokens.onnx"]["outputs"][EMBEDS]["shape"][-1],
        placeholder=processor.image_token_id,
        images=images_of(graphs["decoder_model_merged.onnx"], "whole(where)", "seen.{}"),
        ends=json.dumps(ends_of(generation)),
        longest=LONGEST,
        ahead=f" + {first_position}" if first_position else "",
    ).strip("\n")


def client_loop(prompt: str, hub_id: str | None) -> str:
    """With transformers.js."""
    return CLIENT.format(**places(hub_id), text=json.dumps(prompt), longest=LONGEST).strip("\n")
