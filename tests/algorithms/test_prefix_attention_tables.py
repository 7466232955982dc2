"""Tables of a tree on a GPU that is not there: streams and captures are stood in for."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rlcore.algorithms import prefix_attention_tables as tables
from rlcore.algorithms import prefix_attention_varlen as varlen
from rlcore.prefix_tree import PrefixTree

GPU = torch.device("cuda", 0)
TREE = PrefixTree.from_groups([[1, 2]], [[[3], [4, 5]]])
OTHER = PrefixTree.from_groups([[1, 2]], [[[3], [4]]])


@pytest.fixture
def gpu(monkeypatch):
    """Its `stream` is the current one, per thread as torch has it; tensors that go there stay on the CPU."""
    state = SimpleNamespace(stream=1, capturing=False, used=threading.local())

    @contextmanager
    def stream(chosen):
        state.used.stream = chosen.cuda_stream
        yield
        del state.used.stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(varlen, "moved", lambda x, device: torch.from_numpy(x))
    monkeypatch.setattr(tables, "_captured", {})
    tables._by_stream.cache_clear()
    yield state
    tables._by_stream.cache_clear()


def test_a_stream_has_tables_of_its_own(gpu):
    first = varlen.plan(TREE.node_table, GPU)
    gpu.stream = 2
    second = varlen.plan(TREE.node_table, GPU)
    assert first is not second and first[0].queries.data_ptr() != second[0].queries.data_ptr()
    assert varlen.plan(TREE.node_table.clone(), GPU) is second
    gpu.stream = 1
    assert varlen.plan(TREE.node_table, GPU) is first
    assert varlen.plan(OTHER.node_table, GPU) is not first


def test_a_graph_takes_the_tables_of_a_run_before_it_and_keeps_them(gpu):
    before = varlen.plan(TREE.node_table, GPU)
    gpu.capturing, gpu.stream = True, 9
    assert varlen.plan(TREE.node_table, GPU) is before
    with pytest.raises(RuntimeError, match="run with this tree before a CUDA graph"):
        varlen.plan(OTHER.node_table, GPU)
    tables._by_stream.cache_clear()
    assert list(tables._captured.values()) == [before]
    gpu.capturing = False
    assert varlen.plan(TREE.node_table, GPU) is not before
    assert list(tables._captured.values()) == [before]


def test_tables_are_made_on_the_stream_of_their_use_by_a_thread_without_a_graph_of_its_own(gpu):
    def make(nodes, device, *numbers):
        return nodes.shape, device, numbers, gpu.used.stream, threading.get_ident()

    gpu.stream = 7
    *arguments, stream, thread = tables.kept(make, TREE.node_table, GPU, 3, None)
    assert arguments == [TREE.node_table.shape, GPU, (3, None)] and stream == 7
    assert thread != threading.get_ident()


def test_what_goes_wrong_there_is_raised_here(gpu):
    def make(nodes, device):
        raise MemoryError("no room for tables")

    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            tables.kept(make, TREE.node_table, GPU)
