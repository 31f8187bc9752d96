"""The other side of `recipes.benchmark_gguf`: llama.cpp on the same file, in the same protocol.

Run by path, not with `-m`, by an interpreter that has `cyllama` (llama.cpp built for processors, on PyPI). Settings are llama.cpp's own but
for the threads, one a core, and the cache's places. It multiplies the weights as they are packed in the file.
"""

import json
import os
import random
import sys
import time

from cyllama.llama import llama_cpp


def main(spec: dict) -> None:
    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(spec["model"], llama_cpp.LlamaModelParams())
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx, settings.n_batch = spec["slots"], spec["slots"]
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.LlamaContext(model, settings)
    greedy = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    greedy.add_greedy()
    draw = random.Random(0)
    tokens = [draw.randrange(model.get_vocab().n_vocab) for _ in range(spec["prompt"])]

    def round_of_work() -> dict[str, float]:
        context.kv_cache_clear()
        begin = time.perf_counter()
        context.decode(llama_cpp.llama_batch_get_one(tokens, 0))
        context.synchronize()
        prefilled = time.perf_counter()
        for place in range(len(tokens), len(tokens) + spec["new"]):
            context.decode(llama_cpp.llama_batch_get_one([greedy.sample(context, -1)], place))
        context.synchronize()
        return {"prefill_s": prefilled - begin, "decode_s": time.perf_counter() - prefilled}

    round_of_work()
    print(json.dumps({"threads": settings.n_threads, "model": model.desc}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(round_of_work()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
