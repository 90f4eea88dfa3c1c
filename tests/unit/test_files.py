"""What all files have in common: how they are read and written, what is said of damage, and what is no damage."""

import errno
import json
import os
from dataclasses import asdict, dataclass

import pytest
import torch
from reward_guidance.guidance.errors import SHOWN, OutOfMemoryError, pass_out_of_memory, quoted, ran_out_of_memory
from reward_guidance.guidance.records import record
from reward_guidance.guidance.tensors import read_header, read_tensors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool,
]  # fmt: skip


def mappings(path) -> int:
    """How often this process has the file in its memory."""
    with open("/proc/self/maps") as file:
        return sum(str(path) in line for line in file)


def test_tensors_come_back_as_they_were_saved(tmp_path):
    tensors = {str(kind): (torch.rand(3, 5) * 100).to(kind) for kind in TYPES} | {
        "none": torch.empty(0, 3),
        "one": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"said": "so"})
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert read_header(tmp_path / "x.safetensors") == (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {"said": "so"},
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux says what is mapped")
def test_nothing_of_a_file_that_was_read_stays_mapped(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000, 1000)}, path)
    mapped = load_file(path)
    assert mappings(path)
    del mapped
    read = read_tensors(path)
    assert not mappings(path)
    os.truncate(path, 100)
    assert read["x"].sum() == 1e6
    with pytest.raises(SafetensorError):
        read_tensors(path)


def raised(function):
    try:
        return function()
    except Exception as error:
        return error


NO_MEMORY = {
    "Python": MemoryError(),
    "an accelerator": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU": raised(lambda: torch.empty(2**50)),
    "the CPU of Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried..."),
    "a mapping": RuntimeError("unable to mmap 4000 bytes from file <x.safetensors>: Cannot allocate memory (12)"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    "safetensors on Windows": SafetensorError("I/O error: The paging file is too small for this operation to complete. (os error 1455)"),
    "Metal": RuntimeError("MPS backend out of memory (MPS allocated: 18.1 GB)"),
}  # fmt: skip
OTHERS = [
    RuntimeError("shape '[3]' is invalid"),
    OSError(errno.ENOSPC, "No space left"),
    SafetensorError("I/O error (os error 121)"),
    ValueError(),
]


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_it_is_known_when_memory_ran_out(error):
    assert ran_out_of_memory(error)
    accelerator = isinstance(error, torch.cuda.OutOfMemoryError)
    kind, words = (type(error), "CUDA") if accelerator else (OutOfMemoryError, "Memory ran out while x was read")
    with pytest.raises(kind, match=words) as refusal:
        pass_out_of_memory(error, "x was read")
    with pytest.raises(kind, match=words):
        pass_out_of_memory(refusal.value, "something else was done")


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_want_of_memory(error):
    assert not ran_out_of_memory(error)
    pass_out_of_memory(error, "x was read")


def test_what_a_message_quotes_is_short_and_on_one_line():
    assert quoted("a\nb") == r"'a\nb'" and quoted(3) == "3"
    assert len(quoted("x" * 10**6)) == len(quoted(["x"] * 10**6)) == SHOWN + 1


@dataclass(frozen=True)
class Inner:
    count: int
    share: float


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]
    best: tuple[int, float] | None = None
    loud: bool = False


OUTER = Outer(Inner(3, 0.5), ("a", "b"), ((1, 0.5), (2, 1.0)), (2, 1.0), True)


def test_records_come_back_from_json():
    assert record(Outer, json.loads(json.dumps(asdict(OUTER)))) == OUTER
    assert record(Outer, {"inner": {"count": 1, "share": 1}, "names": [], "curve": []}) == Outer(Inner(1, 1.0), (), ())


WRONG = (
    None,
    "x",
    3,
    1.5,
    [],
    [[]],
    {"count": "x"},
    [1],
    ["x", 1],
    [["x", 1]],
    [1, 2, 3],
    True,
    float("nan"),
    float("inf"),
    10**400,
    "x" * 10**6,
)
FITTING = {
    "inner": (),
    "names": ([],),
    "curve": ([],),
    "best": (None,),
    "loud": (True,),
    "count": (3,),
    "share": (3, 1.5),
}


@pytest.mark.parametrize("name", FITTING)
def test_records_of_wrong_types_are_refused_by_name(name):
    for value in WRONG:
        if any(type(value) is type(fitting) and value == fitting for fitting in FITTING[name]):
            continue
        content = json.loads(json.dumps(asdict(OUTER)))
        (content["inner"] if name in ("count", "share") else content)[name] = value
        with pytest.raises(ValueError, match="inner|share" if name == "inner" else name) as refusal:
            record(Outer, content)
        assert len(str(refusal.value)) < 150


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "inner is missing"), (asdict(OUTER) | {"inner": {"share": 1}}, "count is missing"), ([], "it cannot be"),
        (asdict(OUTER) | {"more": 1}, "'more' is not known"),
    ],
)  # fmt: skip
def test_records_that_lack_or_add_something_are_refused(content, said):
    with pytest.raises(ValueError, match=said):
        record(Outer, content)
