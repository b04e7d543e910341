"""A model's digest sees every byte of its weights, and reads them once."""

from pathlib import Path

from tests.tiny import film_rows, make_bert, tiny_job
from trainers.model.source import find_model


def test_a_byte_in_the_middle_is_another_model_and_nothing_is_read_twice(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = make_bert(tmp_path / "model", tiny_tokenizer)
    job = tiny_job(tmp_path, model, "classify", film_rows(10))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + bytes(3 << 20))
    before = find_model(job)
    (kept,) = (Path(job.storage) / "models" / "digests").iterdir()
    assert find_model(job) == before
    kept.write_text("of a file that was not read again")
    assert find_model(job) != before
    kept.unlink()
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    after = find_model(job)
    assert before and after and before.digest != after.digest
