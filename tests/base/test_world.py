"""Messages between the processes of a run: what is sent comes back, large tensors uncopied."""

import pytest
import torch

from llmprune.base.world import LARGE, _packed, _unpacked
from llmprune.mask.pattern import NofM

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (3, 7), (LARGE, 2)])
def test_a_tensor_arrives_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.randint(0, 2, shape).to(dtype)
    found = _unpacked(_packed(sent))
    assert found.dtype == dtype and torch.equal(found, sent)
    found.zero_()  # may be written to, wherever its bytes lie


def test_views_and_parameters_arrive_as_tensors_of_their_own() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    for sent in (whole.T, whole[:, 1:3], torch.nn.Parameter(whole), whole[::2]):
        found = _unpacked(_packed(sent))
        assert torch.equal(found, sent) and type(found) is torch.Tensor and found.is_contiguous()
    assert not _unpacked(_packed(torch.nn.Parameter(whole))).requires_grad


def test_a_message_is_any_data_with_its_tensors_in_it() -> None:
    large, small = torch.rand(LARGE), torch.rand(2)
    sent = {"a": [large, small, large], "b": NofM(2, 4), "c": ValueError("x"), "d": torch.float16}
    parts = _packed(sent)
    assert len(parts) == 2  # one large tensor, named twice
    found = _unpacked(parts)
    assert torch.equal(found["a"][0], large) and found["a"][0] is found["a"][2]
    assert torch.equal(found["a"][1], small)
    assert found["b"] == NofM(2, 4) and str(found["c"]) == "x" and found["d"] is torch.float16


def test_large_tensors_are_sent_from_where_they_lie() -> None:
    large = torch.rand(LARGE)
    assert _packed({"x": large})[1].data_ptr() == large.data_ptr()


def test_a_message_is_not_tied_to_what_was_sent() -> None:
    small = torch.zeros(3)
    parts = _packed(small)
    small.fill_(1)
    assert torch.equal(_unpacked(parts), torch.zeros(3))
