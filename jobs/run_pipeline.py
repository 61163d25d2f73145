"""Runs every stage in order, on this machine or as jobs of a Ray cluster, and leaves out what is finished.

python -m jobs.run_pipeline --config jobs/configs/quickstart/pipeline.yaml [--images FOLDER]
python -m jobs.run_pipeline --config FILE --output s3://bucket/run --address http://head:8265
"""

from __future__ import annotations

from jobs.stages.pipeline import PipelineConfig, run_stages, stages
from jobs.stages.runner import job_starter, log_url
from pipeline import storage
from pipeline.config import run_job


def run_pipeline(config: PipelineConfig) -> None:
    """Run all stages, and print what the report's job printed: the summary table and the page's place.

    That is read back from the log, because making it anew takes the models and ten seconds of imports.
    """
    places = {"output": config.root, "images": config.image_source}
    with job_starter(config.address, stages(config), places) as start:
        run_stages(config, start)
    summary = storage.read_or_none(log_url(config.root, "write_report"))
    if summary is not None:
        print(f"\n{summary.decode(errors='replace').strip()}", flush=True)


if __name__ == "__main__":
    run_job(run_pipeline, PipelineConfig)
