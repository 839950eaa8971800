"""Every setting of the server, once: name, default, help. The only reader of the environment."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import Refused


class Settings(BaseSettings):
    """Read from arguments, then from `TRELLIS_…` in the environment."""

    model_config = SettingsConfigDict(env_prefix="TRELLIS_", frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="Address to listen on. Any address other than loopback needs a password."
    )
    port: int = Field(8117, ge=0, le=65535, description="Port to listen on. 0: any free port.")
    save_dir: Path = Field(
        Path.home() / ".trellis", description="Folder for all data: database, weights, models, logs."
    )
    database_url: str = Field("", description="SQLAlchemy URL of the database. Empty: SQLite in the save folder.")
    password: SecretStr = Field(SecretStr(""), description="The owner's password. Empty: no login, loopback only.")
    allowed_hosts: str = Field(
        "", description="Additional host names for this server, comma-separated, for use behind a proxy."
    )
    behind_proxy: bool = Field(
        False, description="Trust the X-Forwarded headers of a proxy on this computer, which must set them itself."
    )
    model_dirs: str = Field(
        "", description="Additional folders with one folder per model, separated by “:” (“;” on Windows)."
    )
    data_dirs: str = Field("", description="Additional folders with files of prompts, written like model_dirs.")
    idle_minutes: float = Field(
        120.0,
        ge=0,
        description="Unload a model that has not been used for this many minutes; its sessions are kept. 0: never.",
    )
    engine_memory_gb: float = Field(0.0, ge=0, description="Memory limit of one engine, in GB. 0: no limit.")
    engine_cache_gb: float = Field(
        0.5,
        ge=0,
        description="Weights that one engine keeps in memory, in GB: those in use and those that foresight computed.",
    )
    upload_gb: float = Field(50.0, gt=0, description="Largest upload of a model or a file of prompts, in GB.")
    hub_timeout: float = Field(
        60.0, gt=0, description="Seconds without any data from Hugging Face after which a download fails."
    )
    local_servers: str = Field(
        "",
        description="Model servers in your own network that may be used, as comma-separated host:port, such as "
        "“localhost:11434”. Others must have public addresses, or be allowed on the Connections page.",
    )
    rate_limit: int = Field(
        120, ge=0, description="Expensive actions per minute for one client (sessions, loads, exports). 0: no limit."
    )
    engine_threads: int = Field(0, ge=0, description="CPU threads of an engine. 0: one per core.")
    foresight: Literal["on", "mains", "off"] = Field(
        "on", description="Compute the result of each choice while you read: always, on mains power only, or never."
    )
    fake_engine: bool = Field(False, description="Run without models, for tests of the studio itself.")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.save_dir / 'trellis.db'}"

    @property
    def weights_dir(self) -> Path:
        return self.save_dir / "weights"

    @property
    def models_folders(self) -> list[Path]:
        """Folders that hold models; uploads go into the first."""
        return [self.save_dir / "models", *_split_paths(self.model_dirs)]

    @property
    def prompts_folders(self) -> list[Path]:
        """Folders that files of prompts are read from; uploads go into the first."""
        return [self.save_dir / "prompts", *_split_paths(self.data_dirs)]

    @property
    def allowed_private_servers(self) -> frozenset[str]:
        """Servers that may have private addresses, as `host:port`, lower case."""
        return frozenset(each.strip().lower() for each in self.local_servers.split(",") if each.strip())

    @property
    def engine_memory_bytes(self) -> int:
        return int(self.engine_memory_gb * 1e9)

    @property
    def engine_cache_bytes(self) -> int:
        return int(self.engine_cache_gb * 1e9)

    @property
    def logs_dir(self) -> Path:
        return self.save_dir / "logs"

    @property
    def host_names(self) -> frozenset[str]:
        """The names that a request's Host may carry, lower case and without a port."""
        more = (name.strip().lower() for name in self.allowed_hosts.split(","))
        own = {"localhost", "127.0.0.1", "[::1]", self.host.lower()}
        return frozenset(own | {name for name in more if name})

    def require_password_beyond_loopback(self) -> None:
        """Raise Refused if the server would listen to other machines without a password."""
        if not is_loopback(self.host) and not self.password.get_secret_value():
            raise Refused(
                f"The address “{self.host}” can be reached from other machines, and no password is set.",
                code="password_required",
                next_step="Set TRELLIS_PASSWORD, or listen on 127.0.0.1.",
            )


def _split_paths(text: str) -> list[Path]:
    return [Path(part).expanduser() for part in text.split(os.pathsep) if part.strip()]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
