"""What the names of a file's tensors say beside the model's own: wrappers around it, a LoRA, quantisation. No torch."""

import re
from collections.abc import Iterable, Mapping

# What torch puts around a module that it compiles, shards or recomputes, at any depth.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# In front of every name: DataParallel's, DDP's and DeepSpeed's; ComfyUI's transformer; its autoencoder.
PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "first_stage_model.")
LORA = re.compile(r"(?:^|[._])(?:g?lora|lokr|loha|hada|dora|b?oft|lycoris)(?:[._0-9A-Z]|$)|\.diff(?:_b)?$")
# Parts of the names of scales and tables beside quantised weights.
QUANTISED = {
    **dict.fromkeys(("scaled_fp8", "scale_weight", "scale_input"), "ComfyUI's scaled float8"),
    **dict.fromkeys(
        ("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "output_scale", "weight_packed"),
        "weights with scales",
    ),
    **dict.fromkeys(("absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state", "SCB"), "bitsandbytes"),
    **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx", "wscales", "qscales"), "GPTQ, AWQ or SVDQuant"),
    **dict.fromkeys(("_data", "_scale"), "quanto"),
}
UNQUANTISED = "give the publisher's bfloat16, float16 or float32 weights"  # the remedy


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """(name -> name without what was put around the model, what that was).

    WRAPPERS go wherever they stand, PREFIXES where every name has them: no model known here has them itself.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    taken = [f"{wrapper}." for wrapper in WRAPPERS if any(wrapper in name.split(".") for name in plain)]
    while prefix := next((prefix for prefix in PREFIXES if plain and shared(prefix, plain.values())), None):
        plain = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
        taken.append(prefix)
    return plain, taken


def shared(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names)


def is_lora(names: Iterable[str]) -> bool:
    """Whether these are the small matrices that are added to a model's, of kohya, peft, diffusers or LyCORIS."""
    found = [LORA.search(name) is not None for name in names]
    return 2 * sum(found) > len(found)


def quantisation(dtypes: Mapping[str, str]) -> str | None:
    """How a file is quantised, with the first tensor that shows it; None where it is not.

    dtypes: of each tensor, by safetensors' names. Weights in plain float8 are weights: they only have to be converted.
    """
    for name, dtype in dtypes.items():
        for part in name.split("."):
            if part in QUANTISED:
                return f"{QUANTISED[part]}: {name}"
        if name.endswith("weight") and not dtype.startswith(("F", "BF")):
            return f"{name} is {dtype}"
    return None
