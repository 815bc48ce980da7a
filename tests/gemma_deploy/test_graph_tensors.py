import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gemma_deploy.errors import BundleError, UnsafePathError
from gemma_deploy.graph_checks import check_graph

WEIGHTS = "weights.safetensors"
UNSAFE_PATHS = [
    "/etc/passwd",
    "../outside",
    "sub/../../outside",
    "..\\outside",
    "C:\\outside",
    "link",
    "linked_folder/outside",
    "loop",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with weights, and links that lead out of it."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes(range(200)))
    (tmp_path / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "linked_folder").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    return folder


def external(*, dims: tuple[int, ...] = (2,), dtype: int = 1, **entries: Any) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name="w", data_type=dtype, dims=dims, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_an_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [], initializer=[tensor])
    return onnx.helper.make_model(graph)


def in_an_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def in_a_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    branch = in_an_initializer(tensor).graph
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def in_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    opsets = [onnx.helper.make_opsetid("", 23)]
    function = onnx.helper.make_function(
        "gemma_deploy", "GemmaAttention", [], ["y"], [node], opsets
    )
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), functions=[function])


Place = Callable[[onnx.TensorProto], onnx.ModelProto]
PLACES = [in_an_initializer, in_an_attribute, in_a_subgraph, in_a_function]


def check(folder: Path, tensor: onnx.TensorProto, place: Place = in_an_initializer) -> None:
    graph = folder / "graph.onnx"
    graph.write_bytes(place(tensor).SerializeToString())
    check_graph(folder, graph, WEIGHTS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("entries", [{"offset": "192", "length": "8"}, {"offset": "192"}, {}])
def test_external_data_within_its_file(folder: Path, place: Place, entries: dict[str, Any]) -> None:
    check(folder, external(location=WEIGHTS, **entries), place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", UNSAFE_PATHS)
def test_external_data_outside_of_the_bundle(folder: Path, place: Place, path: str) -> None:
    message = f"graph.onnx (tensor w) names {path!r}, which leads out of the bundle"
    with pytest.raises(UnsafePathError, match=re.escape(message)):
        check(folder, external(location=path), place)


def test_external_data_without_location(folder: Path) -> None:
    with pytest.raises(UnsafePathError, match=r"names '', which leads out"):
        check(folder, external(length="8"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "196", "length": "8"}, "'w' ends at byte 204 of 'weights.safetensors', which"),
        ({"offset": "196"}, "'w' ends at byte 204 of 'weights.safetensors', which has 200 bytes"),
        ({"offset": "196", "length": "0"}, "'w' ends at byte 204 of 'weights.safetensors', which"),
        ({"offset": "196", "length": "4"}, "'w' ends at byte 204 of 'weights.safetensors', which"),
        ({"length": "4"}, r"'w' of shape \[2\] has 4 bytes; expected 8: the bundle is damaged"),
        ({"length": "12"}, r"'w' of shape \[2\] has 12 bytes; expected 8: the bundle is damaged"),
        ({"offset": "-1"}, "'w' has offset '-1', expected a number of bytes"),
        ({"offset": "٣"}, "'w' has offset '٣', expected a number of bytes"),
        ({"offset": "9" * 5000}, r"has offset '9+… \(5,002 characters\), expected a number"),
        ({"length": "x"}, "'w' has length 'x', expected a number of bytes"),
        ({"offset": "2"}, "'w' lies at byte 2 of 'weights.safetensors', expected in w"),
    ],
)
def test_external_data_that_is_not_all_there(
    folder: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        check(folder, external(location=WEIGHTS, **entries))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", ["prepacked_0", "prepacked_17", "basepath", "Location"])
def test_what_else_external_data_says(folder: Path, place: Place, key: str) -> None:
    """ONNX Runtime runs what `prepacked_0` points at as the weight's packed form, unchecked."""
    entries: dict[str, Any] = {key: "MatMul|64;8;0"}
    with pytest.raises(BundleError, match=f"data of tensor 'w' says '{key}': gemma-deploy has not"):
        check(folder, external(location=WEIGHTS, **entries), place)


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_external_data_that_says_one_thing_twice(folder: Path, key: str) -> None:
    tensor = external(location=WEIGHTS, offset="0", length="8")
    tensor.external_data.add(key=key, value="8")
    with pytest.raises(BundleError, match="the external data of tensor 'w' says one thing twice"):
        check(folder, tensor)


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", f"./{WEIGHTS}", "other.bin"])
def test_external_data_in_another_file(folder: Path, location: str) -> None:
    """The first is how ONNX Runtime names the process's own memory: a file may have that name."""
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    for name in ("*/_ORT_MEM_ADDR_/*", "other.bin"):
        (folder / name).write_bytes(bytes(8))
    with pytest.raises(BundleError, match=re.escape(f"of '{location}', expected in {WEIGHTS}")):
        check(folder, external(location=location))


def test_external_data_in_a_missing_file(folder: Path) -> None:
    with pytest.raises(BundleError, match="ends at byte 8 of 'gone', which has 0 bytes"):
        check(folder, external(location="gone", length="8"))


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        (1, (-1,)),
        (8, (1,)),
        (999, (1,)),
        (1, (0, (1 << 40) + 1)),
        (1, (1,) * 9),
        (1, (1 << 62,) * 235),
        (1, (1 << 62,) * 200_000),
    ],
)
def test_tensors_of_no_size(folder: Path, dtype: int, dims: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match=f"'w' is of dtype {dtype} and shape .*: gemma-deploy"):
        check(folder, external(dims=dims, dtype=dtype, location=WEIGHTS))


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        (onnx.TensorProto.INT4, (399,)),
        (onnx.TensorProto.UINT8, (200,)),
        (onnx.TensorProto.BFLOAT16, (10, 10)),
        (onnx.TensorProto.INT64, (25,)),
    ],
)
def test_what_a_tensor_needs(folder: Path, dtype: int, dims: tuple[int, ...]) -> None:
    check(folder, external(dims=dims, dtype=dtype, location=WEIGHTS))
    with pytest.raises(BundleError, match="which has 200 bytes"):
        check(folder, external(dims=(*dims, 2), dtype=dtype, location=WEIGHTS))


def test_tensors_inside_the_graph(folder: Path) -> None:
    check(folder, onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    check(folder, onnx.helper.make_tensor("w", onnx.TensorProto.INT64, [2], [0, 1]))
    empty = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[10**9])
    with pytest.raises(BundleError, match=r"shape \[1000000000\] needs 4,000,000,000 bytes and ho"):
        check(folder, empty)
    larger = onnx.TensorProto(name="w", data_type=7, dims=[1], raw_data=bytes(16))
    with pytest.raises(BundleError, match=r"shape \[1\] needs 8 bytes and holds more"):
        check(folder, larger)
