"""`probes fewshot`."""

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from probes.configs import TaskConfig
from probes.fewshot_config import FewShotConfig, FewShotData


@with_config(data=FewShotData, reading=TaskConfig, head=FewShotConfig)
def fewshot(
    *,
    data: FewShotData,
    reading: TaskConfig,
    head: FewShotConfig,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Few-shot curves: heads on 1 to 16 shots, 100 seeded draws at once, mean and 2.5 to 97.5 % band on test.

    n shots of several labels are n positives and n negatives of each label, solved label by label; masked samples are
    not drawn. n shots of classes are n of every class. With `--by patient` a shot is a patient with all its training
    samples of that class. Fewer shots are a prefix of more. A label that has too few is skipped and named.

    Examples: `probes fewshot --dataset chexpert`; `probes fewshot --dataset cxr --model tiny --labels Edema,Effusion
    --head ncm --scaling centred`; C chosen within the shots: `probes fewshot --dataset cxr --select inner`; shares of
    the training patients: `probes fewshot --dataset cxr --shots "" --percent 1,10 --by patient --repeats 10`.
    """
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.curves import print_curves
    from probes.fewshot import evaluate_fewshot

    home = Store(store_path(store))
    if not json:
        print(f"store {home.path}", flush=True)
    records = evaluate_fewshot(
        home, data, head, reading=reading, progress=lambda total: show.progress("probes fewshot", total, unit="curves")
    )
    if json:
        show.emit_json(records)
    else:
        print_curves(records, show.table)


COMMANDS = {"fewshot": fewshot}
