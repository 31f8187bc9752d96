"""XLA flags for programs that are compiled once and run once, on tiny arrays, so that what counts is how long they compile."""

from importlib import metadata

# CPU seconds to compile the step of a tiny llama with AdamW: 4.2 as users have it, 2.3 without LLVM's optimizer. jaxlib 0.10 can also do
# without the emitters of fusions, each a small MLIR pipeline, 1.4, and then gains from one LLVM module in place of 32, 1.0. In 0.12 the one
# flag is gone and the other gains nothing. An unknown flag ends the process.
_OF_RELEASE = {"0.10": ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]}
FLAGS = ["--xla_backend_optimization_level=0", *_OF_RELEASE.get(".".join(metadata.version("jaxlib").split(".")[:2]), [])]
