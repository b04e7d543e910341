"""A model's digest sees every byte of its weights and of its teacher's, and reads them once."""

from pathlib import Path

from tests.tiny import film_rows, make_bert, shard_locally, tiny_job
from trainers.model.source import _gguf_target, find_model
from trainers.run.folder import run_folder


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


def test_a_teacher_that_changes_under_its_path_is_another_run(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model, teacher = (
        make_bert(tmp_path / name, tiny_tokenizer, seed) for seed, name in enumerate(("model", "teacher"))
    )
    alone = tiny_job(tmp_path, model, "classify", film_rows(10))
    job = tiny_job(tmp_path, model, "classify", film_rows(10), train={"distill": {"teacher": str(teacher)}})
    shards = shard_locally(job)
    found = find_model(job)
    assert found and found.digest != find_model(alone).digest and find_model(job) == found
    before = run_folder(job, found.digest, shards)
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = find_model(job)
    assert after and str(run_folder(job, after.digest, shards)) != str(before)


def test_a_gguf_file_that_differs_in_its_middle_is_converted_anew(tmp_path: Path, tiny_tokenizer: Path) -> None:
    job = tiny_job(tmp_path, make_bert(tmp_path / "model", tiny_tokenizer), "classify", film_rows(10))
    job = job.model_copy(update={"model": job.model.model_copy(update={"gguf_file": "m.gguf"})})
    targets = []
    for name, middle in (("a", b"0"), ("b", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(bytes(3 << 20) + middle + bytes(3 << 20))
        targets.append(_gguf_target(job, tmp_path / name))
    assert targets[0] != targets[1]
