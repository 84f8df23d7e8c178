"""Names that commands offer, without what needs torch."""

__all__ = ["GGUF_TYPES", "TARGET_NAMES"]

TARGET_NAMES = ("vllm", "gguf", "onnx")
"""What converted models can be given to; `targets.TARGETS` says what each holds."""

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What the weights of a GGUF file may be stored as. Vectors are always f32."""
