"""The model and the tokenizer that a pipeline is made of, as transformers' users name them."""

from collections.abc import Mapping
from pathlib import Path

from gemma_deploy.errors import RequestError
from gemma_deploy.hub import resolve_checkpoint
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.dtypes import check_dtype, dtype_name
from gemma_deploy.runtime.source import may_be_hub_id
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.user_paths import user_path


def model_folder(model: object) -> str | Path:
    """Return the folder of a model; one that is not here and reads as a hub id is downloaded.

    Raises:
        RequestError: It is no path.
        HubError: The model cannot be downloaded.
    """
    if model is None:
        raise RequestError("model is missing: give the folder of a bundle or of a checkpoint")
    if not isinstance(model, str | Path):
        raise RequestError(
            f"model is {type(model).__name__}; expected the folder of a bundle, of a checkpoint or of "
            "an engine, a model's name on the hub, or what gemma_deploy.load returned"
        )
    if isinstance(model, str) and not Path(model).exists() and may_be_hub_id(model):
        return resolve_checkpoint(model)
    return model


def placed(device: object, device_map: object) -> object:
    """Return the device that `device` or `device_map` names; `auto` for neither.

    Raises:
        RequestError: Both are given, or the map spreads the model over devices.
    """
    if device_map is None:
        return "auto" if device is None else device
    if device is not None:
        raise RequestError(
            f"device is {shortened(device)} and device_map is {shortened(device_map)}: give one of them"
        )
    whole = device_map
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        whole = device_map[""]
    try:
        Device.parse(whole)
    except RequestError as err:
        raise RequestError(
            f"device_map is {shortened(device_map)}; a model runs on one device here: expected auto, cpu, cuda or "
            'cuda:N, or {"": device}'
        ) from err
    return whole


def read_tokenizer(given: object) -> GemmaTokenizer:
    """Return a tokenizer as it is, or read it from its folder.

    Raises:
        RequestError: It is neither a `GemmaTokenizer` of this library nor a folder.
        TokenizerError: The folder has no Gemma's tokenizer.
    """
    if isinstance(given, GemmaTokenizer):
        return given
    if isinstance(given, str | Path) and user_path(given).is_dir():
        return GemmaTokenizer.from_pretrained(user_path(given))
    kind = type(given)
    found = (
        shortened(given)
        if isinstance(given, str | Path)
        else f"a {kind.__module__}.{kind.__name__}"
    )
    raise RequestError(
        f"tokenizer is {found}; expected a folder with tokenizer.json, or a "
        "gemma_deploy.tokenizer.GemmaTokenizer. The model's own is used where none is given"
    )


def check_loaded(generator: TextGenerator, device: object, dtype: object) -> None:
    """Refuse another device or dtype than a loaded model has.

    Raises:
        RequestError: Saying what it has.
    """
    has_device, wanted = generator.session.device, Device.parse(device)
    if wanted.kind != "auto" and wanted != has_device:
        raise RequestError(
            f"device is {wanted}, but the model was loaded on {has_device}: leave the device out, or "
            "load the model there"
        )
    name = dtype_name(dtype)
    check_dtype(generator.source, name)
    has_dtype = getattr(generator.session, "dtype", name)
    if name not in (None, has_dtype):
        raise RequestError(
            f"dtype is {name}, but the model was loaded in {has_dtype}: leave dtype out, or load the "
            "model with that dtype"
        )
