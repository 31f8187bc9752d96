"""`config.json` ⇄ our configs: read key by key, so that none goes unnoticed, and written only where `transformers` computes the same."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lm import rope

# Keys that say nothing about the function computed: ids the tokenizer owns, versions, caching habits, dtype of the file.
HARMLESS = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "name_or_path", "pad_token_id", "torch_dtype",
        "transformers_version", "use_cache", "_name_or_path",
    }
)  # fmt: skip

_MISSING = object()


class NotInTransformers(ValueError):
    """`transformers` has no such model: a folder of ours can hold it (`lm.save_native`), one for others cannot."""


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

    def take_or_null(self, name: str, default: Any) -> Any:
        """The value of a key where null has a meaning of its own, such as no window; `default` only where the key is absent."""
        self.used.add(name)
        return self.config.get(name, default)

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
    "longrope": (
        rope.LongRope,
        {"original_max_position_embeddings": "original_context"}
        | {name: name for name in ("short_factor", "long_factor", "factor", "attention_factor")},
    ),
}


def read_rope(
    read: ConfigReader,
    context: int,
    *,
    base: float = 10_000.0,
    base_key: str = "rope_theta",
    fraction: float | None = None,
    fraction_key: str = "partial_rotary_factor",
    original_context: int | None = None,
) -> dict[str, Any]:
    """`rope_base` and `rope_scaling`, from the top level and `rope_scaling` (transformers 4) or from `rope_parameters` (transformers 5).
    What transformers would not compute, or we would not, is refused by name.

    **Arguments:**

    - `base`: where the file is silent.
    - `base_key`, `fraction_key`: their names at the top level.
    - `fraction`: of a head that is rotated where the file is silent; then `rope_fraction` is returned too. `None`: the family rotates whole
      heads.
    - `original_context`: of families that keep it at the top level, where it goes before that in the parameters.
    """
    modern = read.take("rope_parameters", {})
    parameters = read.take("rope_scaling", {}) or modern
    theta = float(parameters.get("rope_theta", read.take(base_key, modern.get("rope_theta", base))))
    part = parameters.get("partial_rotary_factor", read.take(fraction_key, modern.get("partial_rotary_factor", fraction or 1.0)))
    if part != 1 and fraction is None:
        raise ValueError(f"config.json has partial_rotary_factor = {part}, which the {read.model_type} of transformers does not compute")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    given = {
        name: value
        for name, value in parameters.items()
        if value is not None and name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    }
    found = {"rope_base": theta} | ({} if fraction is None else {"rope_fraction": part})
    if kind == "default" and set(given) <= {
        "original_max_position_embeddings"
    }:  # transformers 5 writes it for phi3, which has no use for it
        return found | {"rope_scaling": None}
    if kind != "default" and kind not in _ROPE_KINDS:
        raise ValueError(f"config.json asks for RoPE of type {kind!r}; known are default, {', '.join(_ROPE_KINDS)}")
    names = {} if kind == "default" else _ROPE_KINDS[kind][1]
    unknown = set(given) - set(names)
    if unknown:
        raise ValueError(f"config.json has rope parameters we do not know for type {kind!r}: {sorted(unknown)}")
    values = {names[name]: value for name, value in given.items()}
    if kind == "dynamic":
        values |= {"original_context": context, "length": context}
    elif "original_context" in names.values():
        values["original_context"] = original_context or values.get("original_context", context)
        if kind in ("yarn", "longrope"):
            values.setdefault("factor", context / values["original_context"])
    return found | {"rope_scaling": _ROPE_KINDS[kind][0](**values)}


def write_rope(
    model_type: str,
    *,
    rope_base: float,
    rope_scaling: rope.Scaling | None,
    rope_fraction: float,
    head_dim: int,
    context: int,
    base_key: str = "rope_theta",
    fraction_key: str | None = None,
) -> dict[str, Any]:
    """The keys of `config.json` that say it, readable by transformers 4 and 5, or an error where there are none. `fraction_key`: the name
    of `rope_fraction`; `None`: the family rotates whole heads."""
    if rope_fraction != 1 and fraction_key is None:
        raise NotInTransformers(f"the {model_type} of transformers cannot rotate a part of each head (rope_fraction = {rope_fraction})")
    plain: dict[str, Any] = {base_key: rope_base} | ({fraction_key: rope_fraction} if fraction_key else {})
    if rope_scaling is None:
        return plain
    if isinstance(rope_scaling, rope.NTK):  # nothing but another base
        return plain | {base_key: rope.ntk_base(rope_base, int(head_dim * rope_fraction), rope_scaling.factor)}
    if isinstance(rope_scaling, rope.DynamicNTK) and not rope_scaling.length == rope_scaling.original_context == context:
        raise NotInTransformers(
            f"transformers lets dynamic NTK grow with the text; ours is fixed at length {rope_scaling.length}. Only within the context "
            f"({context}), where neither stretches, are they one function: write the fixed one as NTK"
        )
    if isinstance(rope_scaling, rope.LongRope) and rope_scaling.length is not None:
        raise NotInTransformers(
            f"transformers chooses the factors of LongRoPE by each text; ours are fixed for length {rope_scaling.length}. "
            "Write the model with length None"
        )
    for name, (kind, names) in _ROPE_KINDS.items():
        if isinstance(rope_scaling, kind):
            values = {theirs: getattr(rope_scaling, ours) for theirs, ours in names.items()}
            scaling = {"rope_type": name} | {theirs: value for theirs, value in values.items() if value is not None}
            return plain | {"rope_scaling": scaling}
    raise NotInTransformers(f"the {model_type} of transformers has no key for rope_scaling = {rope_scaling!r}")


LayerKind = Literal["sliding_attention", "full_attention"]  # a layer that sees a window, and one that sees all that came before


def every_full(period: int, n_layers: int) -> tuple[LayerKind, ...]:
    """`layer_types` where a file has none: each `period`-th layer sees everything, those between them a window."""
    return tuple("full_attention" if layer % period == 0 else "sliding_attention" for layer in range(1, n_layers + 1))


def check_layer_types(layer_types: tuple[LayerKind, ...], n_layers: int) -> None:
    """Kinds of layers that do not cover the layers, in words."""
    if len(layer_types) != n_layers:
        raise ValueError(f"layer_types must name {n_layers} kinds, one for each of n_layers; it names {len(layer_types)}")


def read_rope_of_kinds(read: ConfigReader, context: int, bases: Mapping[LayerKind, tuple[str, float]]) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of layers that see everything, `rope_base_local` of those with a window, which no file scales.

    **Arguments:**

    - `bases`: the key for each kind's base at the top level (transformers 4), and the base where no key gives one. In transformers 5 both
      stand in `rope_parameters`, under the kinds.
    """
    nested, scaling = read.take("rope_parameters", {}), read.take("rope_scaling", {})
    if unknown := set(nested) - set(bases):
        raise ValueError(f"rope_parameters of {read.model_type} must be given for {' and '.join(bases)}; it has {sorted(unknown)}")
    found = {}
    for kind, (key, default) in bases.items():
        parameters = dict(nested.get(kind) or {}) | (scaling if kind == "full_attention" else {})
        base = parameters.pop("rope_theta", read.take(key, default))
        found[kind] = read_rope(ConfigReader({"rope_theta": base, "rope_scaling": parameters}, read.model_type), context)
    if found["sliding_attention"]["rope_scaling"] is not None:
        raise ValueError(
            f"config.json scales RoPE in sliding layers ({nested['sliding_attention']}); our {read.model_type} does so in full layers only"
        )
    return found["full_attention"] | {"rope_base_local": found["sliding_attention"]["rope_base"]}


def read_decoder(
    read: ConfigReader, *, context: int, norm_eps: float = 1e-6, tied: bool = False, head_dim: int | None = None, **of_rope: Any
) -> dict[str, Any]:
    """What decoders of Llama's kin have in common, by our names; the defaults, where the file is silent, are those of the family.
    `head_dim=None`: d_model / n_heads. `of_rope` goes to `read_rope`."""
    n_heads, d_model = read.take("num_attention_heads"), read.take("hidden_size")
    context = read.take("max_position_embeddings", context)
    read.expect("hidden_act", "silu", default="silu")
    return {
        "vocab": read.take("vocab_size"),
        "d_model": d_model,
        "n_layers": read.take("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": read.take("num_key_value_heads", n_heads),
        "head_dim": read.take("head_dim", head_dim or d_model // n_heads),
        "d_ff": read.take("intermediate_size"),
        "context": context,
        "norm_eps": read.take("rms_norm_eps", norm_eps),
        "tied": read.take("tie_word_embeddings", tied),
        "init_std": read.take("initializer_range", 0.02),
        "attention_dropout": read.take("attention_dropout", 0.0),
        **read_rope(read, context, **of_rope),
    }


def write_decoder(config: Any, **of_rope: Any) -> dict[str, Any]:
    """The keys `read_decoder` reads; `of_rope` goes to `write_rope`."""
    numbers = {name: getattr(config, name) for name in ("rope_base", "rope_scaling", "rope_fraction", "head_dim", "context")}
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context,
        **write_rope(config.model_type, **numbers, **of_rope),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout,
    }


def read_windows(read: ConfigReader, n_layers: int, slides: Callable[[int], bool], window: int | None) -> tuple[int | None, ...] | None:
    """`window_by_layer` of families whose `layer_types` say which layers slide; `slides(layer)` where they say nothing, and `window` where
    `sliding_window` is absent. `None`: no layer slides."""
    window = read.take_or_null("sliding_window", window)
    window = window if read.take("use_sliding_window", False) else None
    by_rule = ["sliding_attention" if window is not None and slides(i) else "full_attention" for i in range(n_layers)]
    kinds = read.take("layer_types", by_rule)
    if len(kinds) != n_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json has layer_types = {kinds}; expected {n_layers} of full_attention or sliding_attention")
    if "sliding_attention" not in kinds:
        return None
    if window is None:
        raise ValueError("config.json has layer_types with sliding_attention, but no sliding_window, or use_sliding_window is not true")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def write_windows(model_type: str, window_by_layer: tuple[int | None, ...] | None, n_layers: int) -> dict[str, Any]:
    """The keys `read_windows` reads."""
    windows = window_by_layer or (None,) * n_layers
    found = {window for window in windows if window is not None}
    if len(found) > 1:
        raise NotInTransformers(f"the {model_type} of transformers has one window for all layers that slide; these have {sorted(found)}")
    window = next(iter(found), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((layer for layer, each in enumerate(windows) if each is not None), n_layers),  # for older versions
        "layer_types": ["full_attention" if each is None else "sliding_attention" for each in windows],
    }


def window_of_all(model_type: str, window_by_layer: tuple[int | None, ...] | None) -> int | None:
    """The window of families with one for all layers, or none."""
    found = set(window_by_layer or (None,))
    if len(found) > 1:
        raise NotInTransformers(
            f"the {model_type} of transformers has one window for all layers, or none; got window_by_layer = {window_by_layer}"
        )
    return found.pop()


def refuse_native(model_type: str, **settings: Any) -> None:
    """Refuse to write under a borrowed `model_type` what `transformers` would not compute."""
    native = {name: value for name, value in settings.items() if value is not None}
    if native:
        raise NotInTransformers(
            f"transformers has no {model_type} with {', '.join(f'{name} = {value!r}' for name, value in native.items())}: "
            f"its config.json cannot say so, and it would compute another function. A folder of ours can (lm.save_native)"
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
