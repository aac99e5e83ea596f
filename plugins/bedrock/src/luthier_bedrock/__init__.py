"""The provider `bedrock`: fine-tuning jobs at Amazon Bedrock. This module is light: it only says what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = re.compile(r"(?:[0-9a-zA-Z][_-]?){0,51}[0-9a-zA-Z]")  # a model's name has 63 characters; eleven name the job
FOLDER = re.compile(r"s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](?:/[-!_*'().a-z0-9A-Z]+)*/?")  # as the service model has it
ROLE = re.compile(r"arn:aws(-[^:]+)?:iam::([0-9]{12})?:role/.+")


@attrs.frozen(kw_only=True)
class Bedrock:
    role_arn: str | None = option(None, help="The IAM role that Bedrock takes on to read and write the folder.")
    s3_folder: str | None = option(None, help="Where rows and results lie, such as s3://BUCKET/luthier.")
    region: str | None = option(None, help="The region; none: AWS_REGION, AWS_DEFAULT_REGION or the profile's.")
    profile: str | None = option(None, help="A profile of the AWS configuration; none: as AWS_PROFILE says.")
    access_key_id: str | None = option(
        None, help="An access key's id, which is no secret; none: AWS's own chain of places is asked."
    )
    secret_access_key: str = option("env:AWS_SECRET_ACCESS_KEY", help="Where that access key's secret is.")
    session_token: str | None = option(None, help="Where that access key's session token is; none: it has none.")
    suffix: str | None = option(None, help="The tuned model's name, which the job's own characters follow.")
    learning_rate_multiplier: float | None = option(
        None, help="Times the service's own learning rate, for models of Anthropic.", low=0.0
    )
    base_url: str | None = option(None, help="Bedrock's address; none: the region's.")
    s3_url: str | None = option(None, help="S3's address, with the bucket in the path; none: the bucket's own.")

    def __attrs_post_init__(self) -> None:
        check_reference(self.secret_access_key, "Bedrock.secret_access_key")
        if self.session_token is not None:
            check_reference(self.session_token, "Bedrock.session_token")
        for name, pattern, meant in (
            ("suffix", SUFFIX, "1 to 52 letters and digits, with single - and _ between them"),
            ("s3_folder", FOLDER, "an address such as s3://BUCKET/luthier"),
            ("role_arn", ROLE, "a role such as arn:aws:iam::123456789012:role/NAME"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise LuthierError("recipe-out-of-range", f"it is {meant}", where=f"Bedrock.{name}", found=value)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="bedrock",
            summary="Fine-tuning jobs at Amazon Bedrock: SFT, rows and metrics in S3, models hosted only.",
            options=Bedrock,
            build="luthier_bedrock.service:BedrockService",
        )
    ]
