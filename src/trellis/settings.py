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

    host: str = Field("127.0.0.1", description="Address to listen on. Any but this computer's own needs a password.")
    port: int = Field(8117, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    save_dir: Path = Field(
        Path.home() / ".trellis",
        description="Folder for everything that is kept: database, weights, models, logs.",
    )
    database_url: str = Field("", description="SQLAlchemy address of the database. Empty: SQLite in the save folder.")
    password: SecretStr = Field(SecretStr(""), description="Password of the owner. Empty: no login, loopback only.")
    allowed_hosts: str = Field(
        "",
        description="More names that browsers may use for this server, with commas, for use behind a proxy.",
    )
    behind_proxy: bool = Field(
        False, description="Believe the X-Forwarded headers of a proxy on this computer, which must set them itself."
    )
    model_dirs: str = Field(
        "", description="More folders that hold a folder for each model, with “:” between them (“;” on Windows)."
    )
    data_dirs: str = Field(
        "", description="More folders that files of prompts may be read from, written like model_dirs."
    )
    idle_minutes: float = Field(
        120.0, ge=0, description="A model that nobody has used for so long is unloaded; sessions stay. 0: never."
    )
    engine_memory_gb: float = Field(0.0, ge=0, description="Memory that one engine may take, in GB. 0: no limit.")
    engine_cache_gb: float = Field(
        0.5,
        ge=0,
        description="Weights that one engine keeps in memory, in GB: those in use, and those that foresight made.",
    )
    upload_gb: float = Field(50.0, gt=0, description="The largest upload of a model or a file of prompts, in GB.")
    hub_timeout: float = Field(
        60.0, gt=0, description="Seconds to wait for a hub that says nothing, before a download is given up."
    )
    local_servers: str = Field(
        "",
        description="Servers of models in your own network that may be talked to, as host:port with commas, such as "
        "“localhost:11434”. Others must have public addresses, or be permitted on the page of connections.",
    )
    rate_limit: int = Field(
        120, ge=0, description="Expensive actions a minute that one client may take (sessions, loads, exports). 0: any."
    )
    engine_threads: int = Field(0, ge=0, description="CPU threads of an engine; 0 takes one per core.")
    foresight: Literal["on", "mains", "off"] = Field(
        "on",
        description="Work out what each choice would lead to while it is read: always, on mains power alone, or never.",
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
        """Raises Refused when the server would listen to other machines without a password."""
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
