"""`config.json` ⇄ our configs: read key by key, so that none goes unnoticed, and written only where `transformers` computes the same."""

from collections.abc import Mapping
from typing import Any

from lm import rope

# Keys that say nothing about the function computed: ids the tokenizer owns, versions, caching habits, dtype of the file.
HARMLESS = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "name_or_path", "pad_token_id", "torch_dtype",
        "transformers_version", "use_cache", "_name_or_path",
    }
)  # fmt: skip

_MISSING = object()


class ConfigReader:
    """A `config.json` read key by key, so that at the end none has gone unnoticed."""

    def __init__(self, config: Mapping[str, Any], model_type: str):
        self.config = dict(config)
        self.model_type = model_type
        self.used: set[str] = set()

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a key, or `default` where it is absent or null."""
        self.used.add(name)
        value = self.config.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"config.json of model_type {self.model_type!r} lacks {name!r}")
        return default

    def expect(self, name: str, expected: Any, *, default: Any) -> None:
        """Refuse any value but the one our drawing computes."""
        value = self.take(name, default)
        if value is not default and value != expected:
            raise ValueError(
                f"config.json has {name} = {value!r}; our {self.model_type} computes {name} = {expected!r} only. "
                "Loading it anyway would give another function"
            )

    def finish(self, harmless: set[str]) -> None:
        """Refuse what nobody asked for."""
        quantised = self.config.get("quantization_config")
        if quantised is not None and "quantization_config" not in self.used:
            method = quantised.get("quant_method", quantised) if isinstance(quantised, Mapping) else quantised
            raise ValueError(
                f"config.json has a quantization_config: the weights are packed by {method!r}, which our {self.model_type} does not "
                "unpack. Take the repository of the unquantised model, or save it dequantised with transformers"
            )
        unknown = {
            name: value
            for name, value in self.config.items()
            if name not in self.used and name not in HARMLESS and name not in harmless and value is not None
        }
        if unknown:
            raise ValueError(
                f"config.json of model_type {self.model_type!r} has keys we do not know: {unknown}. "
                "Each may change the function; handle it in from_hf, or list it there as harmless"
            )


# Hugging Face's name of each rotary parameter → ours, by rope_type.
_ROPE_KINDS: dict[str, tuple[type[rope.Scaling], dict[str, str]]] = {
    "linear": (rope.LinearScaling, {"factor": "factor"}),
    "dynamic": (rope.DynamicNTK, {"factor": "factor"}),
    "llama3": (
        rope.Llama3,
        {"original_max_position_embeddings": "original_context"}
        | {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")},
    ),
    "yarn": (
        rope.Yarn,
        {"original_max_position_embeddings": "original_context"}
        | {name: name for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
    ),
}


def read_rope(read: ConfigReader, context: int, base: float = 10_000.0) -> dict[str, Any]:
    """`rope_base` and `rope_scaling`, from the top level and `rope_scaling` (transformers 4) or from `rope_parameters` (transformers 5).
    `base` is the family's own where the file names none. What transformers would not compute, or we would not, is refused by name."""
    parameters = read.take("rope_parameters", {}) | read.take("rope_scaling", {})
    theta = float(read.take("rope_theta", parameters.get("rope_theta", base)))
    fraction = read.take("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
    if fraction != 1:
        raise ValueError(
            f"config.json has partial_rotary_factor = {fraction}, which the {read.model_type} of transformers does not compute"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    given = {
        name: value
        for name, value in parameters.items()
        if value is not None and name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    }
    if kind != "default" and kind not in _ROPE_KINDS:
        raise ValueError(f"config.json asks for RoPE of type {kind!r}; known are default, {', '.join(_ROPE_KINDS)}")
    names = {} if kind == "default" else _ROPE_KINDS[kind][1]
    unknown = set(given) - set(names)
    if unknown:
        raise ValueError(f"config.json has rope parameters we do not know for type {kind!r}: {sorted(unknown)}")
    if kind == "default":
        return {"rope_base": theta, "rope_scaling": None}
    values = {names[name]: value for name, value in given.items()}
    if kind == "dynamic":
        values |= {"original_context": context, "length": context}
    else:
        if "original_context" in names.values():
            values.setdefault("original_context", context)
        if kind == "yarn":
            values.setdefault("factor", context / values["original_context"])
    return {"rope_base": theta, "rope_scaling": _ROPE_KINDS[kind][0](**values)}


def write_rope(
    model_type: str, *, rope_base: float, rope_scaling: rope.Scaling | None, rope_fraction: float, head_dim: int, context: int
) -> dict[str, Any]:
    """The keys of `config.json` that say it, readable by transformers 4 and 5, or an error where there are none."""
    if rope_fraction != 1:
        raise ValueError(f"the {model_type} of transformers cannot rotate a part of each head (rope_fraction = {rope_fraction})")
    if rope_scaling is None:
        return {"rope_theta": rope_base}
    if isinstance(rope_scaling, rope.NTK):  # nothing but another base
        return {"rope_theta": rope.ntk_base(rope_base, head_dim, rope_scaling.factor)}
    if isinstance(rope_scaling, rope.DynamicNTK) and not rope_scaling.length == rope_scaling.original_context == context:
        raise ValueError(
            f"transformers lets dynamic NTK grow with the text; ours is fixed at length {rope_scaling.length}. Only within the context "
            f"({context}), where neither stretches, are they one function: write the fixed one as NTK"
        )
    for name, (kind, names) in _ROPE_KINDS.items():
        if isinstance(rope_scaling, kind):
            values = {theirs: getattr(rope_scaling, ours) for theirs, ours in names.items()}
            scaling = {"rope_type": name} | {theirs: value for theirs, value in values.items() if value is not None}
            return {"rope_theta": rope_base, "rope_scaling": scaling}
    raise ValueError(f"the {model_type} of transformers has no key for rope_scaling = {rope_scaling!r}")


def refuse_native(model_type: str, **settings: Any) -> None:
    """Refuse to write under a borrowed `model_type` what `transformers` would not compute."""
    native = {name: value for name, value in settings.items() if value is not None}
    if native:
        raise ValueError(
            f"transformers has no {model_type} with {', '.join(f'{name} = {value!r}' for name, value in native.items())}: "
            f"its config.json cannot say so, and it would compute another function. Such a model is kept in checkpoints, not exported"
        )


def check_heads(n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    """Head counts that cannot be grouped or rotated, in words."""
    if n_heads % n_kv_heads:
        raise ValueError(
            f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({n_kv_heads}): each key head serves n_heads / n_kv_heads query heads. "
            f"Divisors of {n_heads}: {[d for d in range(1, n_heads + 1) if n_heads % d == 0]}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim ({head_dim}) must be even, or its rotated part where that is smaller: RoPE turns pairs")
