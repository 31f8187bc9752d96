"""A corpus with fewer held-out documents."""

import pytest

from data.sources import open_source
from recipes.corpus import fewer_held_out


@pytest.fixture
def folders(tmp_path):
    for name, documents in (("a", 90), ("b", 70)):
        (tmp_path / name).mkdir()
        for i in range(documents):
            (tmp_path / name / f"{i:03}.txt").write_text(f"Text {i} of {name}, with a word or two.")
    return tmp_path


def names(documents):
    return [document["name"] for document in documents]


def test_the_held_out_documents_kept_are_evenly_spaced_and_the_training_ones_are_all_there(folders):
    source = open_source(str(folders / "a"))
    everything = names(source.held_out)
    assert len(everything) == 7
    fewer = fewer_held_out(source, 2)
    assert names(fewer.held_out) == [everything[0], everything[3]]
    assert names(fewer.train) == names(source.train)
    record = fewer.record
    assert (record["held_out_documents"], record["held_out_documents_left_out"]) == (2, 5)
    assert record["held_out_bytes"] == sum(len(document["text"].encode()) for document in fewer.held_out)
    assert record["sha256"] != source.record["sha256"]
    assert fewer_held_out(source, 7) is source


def test_a_mixture_keeps_so_many_of_each_part(folders):
    source = open_source(f"{folders / 'a'}:0.7,{folders / 'b'}:0.3")
    fewer = fewer_held_out(source, 1)
    assert names(fewer.held_out) == [name for part in source.parts for name in names(part.source.held_out)[:1]]
    assert fewer.record["held_out_documents"] == 2
    assert [part.weight for part in fewer.parts] == [part.weight for part in source.parts]
