"""The provider `bedrock`: fine-tuning jobs at Amazon Bedrock. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = re.compile(r"(?:[0-9a-zA-Z][_-]?){0,51}[0-9a-zA-Z]")  # a model's name has 63 characters; eleven name the job
FOLDER = re.compile(r"s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](?:/[-!_*'().a-z0-9A-Z]+)*/?")  # as the service model has it
ROLE = re.compile(r"arn:aws(-[^:]+)?:iam::([0-9]{12})?:role/.+")


@attrs.frozen(kw_only=True)
class Bedrock:
    role_arn: str | None = option(None, help="The IAM role with which Bedrock reads and writes the folder.")
    s3_folder: str | None = option(None, help="The S3 folder for rows and results, such as s3://BUCKET/luthier.")
    region: str | None = option(None, help="The region; none: AWS_REGION, AWS_DEFAULT_REGION or the profile's.")
    profile: str | None = option(None, help="A profile of the AWS configuration; none: AWS_PROFILE.")
    access_key_id: str | None = option(
        None, help="The id of an access key, which is no secret; none: botocore finds the credentials."
    )
    secret_access_key: str = option(
        "env:AWS_SECRET_ACCESS_KEY", help="Where the secret of that access key is: env:NAME, file:PATH or cmd:COMMAND."
    )
    session_token: str | None = option(None, help="Where the session token of that access key is; none: it has none.")
    suffix: str | None = option(
        None, help="The beginning of the tuned model's name; characters of the job's id follow it."
    )
    learning_rate_multiplier: float | None = option(
        None, help="Factor of the service's own learning rate, for Anthropic's models.", low=0.0
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
                raise LuthierError("recipe-out-of-range", f"it must be {meant}", where=f"Bedrock.{name}", found=value)


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
