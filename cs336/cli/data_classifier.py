"""`cs336 data classifier VERB`."""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Annotated

from tyro.conf import Positional, arg

from cs336.cli.common import MaybePath, Path, Paths, TextField, check_output
from cs336.utils.documents import TEXT_FIELD, Document, read_documents

MaybePair = tuple[int, int] | None


def train(
    inputs: Positional[Paths] = (),
    output: Path = Path("classifier.safetensors"),  # noqa: B008 (immutable)
    classes: Annotated[dict[str, Path], arg(metavar="LABEL PATH ...")] | None = None,
    label_field: str = "label",
    text_field: TextField = TEXT_FIELD,
    word_ngrams: int = 1,
    char_ngrams: MaybePair = None,
    bucket_bits: int = 20,
    epochs: int = 5,
    learning_rate: float = 2.0,
    held_out: float = 0.1,
    quantize: bool = False,
    seed: int = 0,
    num_threads: int | None = 1,
) -> None:
    """Train a linear n-gram classifier, and print how well it tells texts that it has not seen.

    Args:
        inputs: JSON lines or parquet with a text and a label each, compressed or not, or directories of them.
        output: where the model goes, a safetensors file.
        classes: instead of inputs: pairs of a label and the file or directory of its documents.
        label_field: of inputs: the field that holds the label.
        word_ngrams: 1 for words alone, 2 for pairs of neighbours too, and so on.
        char_ngrams: least and most length of n-grams of characters in words; none if not given.
        bucket_bits: n-grams are hashed into 2^bucket_bits rows of the model.
        epochs: passes over the examples.
        learning_rate: of the first step; it falls to 0.
        held_out: fraction of the documents that is not trained on but evaluated; 0 for none.
        quantize: write int8 weights.
        seed: of the order of the examples, and of what is held out.
        num_threads: with more than 1 a run differs a little from the next.
    """
    from cs336.data.corpus import in_validation
    from cs336.data.filter.classifier import Classifier, Features

    if bool(inputs) == bool(classes):
        raise ValueError("give either files with a label a line, or --classes LABEL PATH ...")
    check_output(output, *inputs, *(classes or {}).values())

    def examples(validation: bool) -> Iterator[tuple[str, str]]:
        source = _of_classes(classes, text_field) if classes else _labelled(inputs, text_field, label_field)
        return (pair for pair in source if in_validation(pair[0], held_out, seed) == validation)

    model = Classifier.train(
        examples(False),
        features=Features(word_ngrams, char_ngrams, bucket_bits),
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        num_threads=num_threads,
    )
    if quantize:
        model = model.quantize()
    model.save(output)
    print(f"{output}: {', '.join(model.labels)}")
    if held_out > 0:
        found = model.evaluate(examples(True), num_threads)
        print(f"accuracy {found.accuracy:.4f} on {found.confusion.sum():,} held-out documents")
        for label, precision, recall, auc in zip(found.labels, found.precision, found.recall, found.auc, strict=True):
            print(f"  {label}: precision {precision:.4f}, recall {recall:.4f}, AUC {auc:.4f}")


def apply(
    model: Positional[Path],
    inputs: Positional[Paths],
    output: MaybePath = None,
    keep: str | None = None,
    min_score: float = 0.5,
    text_field: TextField = TEXT_FIELD,
    num_threads: int | None = None,
) -> None:
    """Label documents: JSON lines of id, label and score on standard output, or whole documents in a file.

    Args:
        model: what `cs336 data classifier train` wrote.
        inputs: files of text, JSON lines, parquet, compressed or not, or directories of them.
        output: a .jsonl file that gets the documents with "label" and "score" added.
        keep: only documents whose probability of this label is at least min_score; score is then that probability.
        min_score: see keep.
        num_threads: as many as there are, if not given.
    """
    from cs336.data.filter.classifier import Classifier
    from cs336.utils.files import replacing

    if not inputs:
        raise ValueError("name the files or directories to label")
    check_output(output, model, *inputs)
    loaded = Classifier.load(model)
    if keep is not None and keep not in loaded.labels:
        raise ValueError(f"{model} has no label {keep!r}, only {', '.join(loaded.labels)}")
    documents = read_documents(inputs, text_field=text_field)

    def rows() -> Iterator[str]:
        while batch := list(itertools.islice(documents, 1024)):
            scores_NK = loaded.probabilities([d.text for d in batch], num_threads)
            scores_N = scores_NK.max(1) if keep is None else scores_NK[:, loaded.labels.index(keep)]
            for document, best, score in zip(batch, scores_NK.argmax(1), scores_N.tolist(), strict=True):
                if keep is None or score >= min_score:
                    found = {"label": loaded.labels[best], "score": round(score, 6)}
                    yield json.dumps(_row(document, output is not None) | found) + "\n"

    if output is None:
        sys.stdout.writelines(rows())
        return
    with replacing(output) as file:
        file.writelines(rows())
    print(output)


def _row(document: Document, whole: bool) -> dict:
    return document.metadata | {"text": document.text, "id": document.id} if whole else {"id": document.id}


def _of_classes(classes: dict[str, Path], text_field: str) -> Iterator[tuple[str, str]]:
    for label, path in classes.items():
        for document in read_documents(path, text_field=text_field, metadata=False):
            yield document.text, label


def _labelled(inputs: tuple[Path, ...], text_field: str, label_field: str) -> Iterator[tuple[str, str]]:
    for document in read_documents(inputs, text_field=text_field):
        label = document.metadata.get(label_field)
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(
                f'{document.id}: expected a label in the field "{label_field}", a string or a whole number, got '
                f"{label!r}; name another one with --label-field, or give --classes"
            )
        yield document.text, str(label)
