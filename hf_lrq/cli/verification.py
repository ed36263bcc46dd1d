"""`hf-lrq verify`: whether a saved model is what was saved, to the last bit."""

from hf_lrq.checkpoint import check_record, header_of, read_config, read_file_headers, verify_tensors, weight_files
from hf_lrq.cli.arguments import VerifyOptions
from hf_lrq.cli.inspection import inspect_directory
from hf_lrq.cli.output import console, print_json
from hf_lrq.errors import CheckpointError


def run(options: VerifyOptions) -> None:
    """The command."""
    inspect_directory(options.directory)  # Tensors that agree with their digests must be those of config.json, too.
    header = header_of(read_config(options.directory))
    if header is None:
        raise CheckpointError(f"{options.directory} is not compressed by hf_lrq, so it has no digests to compare with.")
    files = read_file_headers(weight_files(options.directory))
    without = verify_tensors(check_record(header, files), files)
    tensors = sum(len(each.tensors) for each in files)
    if options.as_json:
        print_json({"files": len(files), "verified": tensors - len(without), "without_digest": list(without)})
        return
    out = console()
    out.print(f"{tensors - len(without)} of {tensors} tensors are what was saved.", markup=False)
    for name in without:
        out.print(f"No digest, not verified: {name}", style="yellow", markup=False)
