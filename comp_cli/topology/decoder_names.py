"""Names of the graphs of decoders that read images, and of their inputs and outputs: those that others know, where any do."""

VISION_ENCODER, EMBED, MERGED = GRAPHS = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
FEATURES, EMBEDS, POSITIONS = "image_features", "inputs_embeds", "position_ids"
BATCH = "batch_size"  # as transformers.js looks for it
PAST, PRESENT = "past_key_values", "present"
WHERE, KEPT, LABELS, WEIGHTS = "image_positions", "image_kept", "image_labels", "image_weights"
BIAS = "bias"  # behind keys and values of all layers: what is added to attention logits at the tokens that they hold
WRITTEN = "labels"  # what torch wrote behind prompts, where graphs are compared with it
