"""What every machine must do for directories of the host."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from machine_kit import WAIT, MachineFixtures, MakeGuest
from watch_kit import ends, start, watch

from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.machine import MachineError, Mount


class MountConformance(MachineFixtures):
    def test_a_writable_directory_of_the_host_is_shared_with_programs_and_file_requests(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        host = tmp_path / "made/shared"
        guest = make(mounts=(Mount(host, "/workspace/in/shared", writable=True),)).start()
        channel = guest.channel
        assert host.is_dir()
        told = watch(channel, "/workspace/in/shared/new/out")
        script = "mkdir new; echo 1234 >new/tmp; mv new/tmp new/out"
        ends(start(channel, PurePosixPath("/workspace/in/shared"), script))
        told.wait_for_last(5)
        assert (host / "new/out").read_bytes() == b"1234\n"
        assert channel.read_file("/workspace/in/shared/new/out", WAIT) == b"1234\n"
        channel.write_file("/workspace/in/shared/a/b", b"by request", WAIT)
        channel.mkdir("/workspace/in/shared/c", WAIT)
        assert (host / "a/b").read_bytes() == b"by request"
        assert (host / "c").is_dir()
        assert channel.file_stat("/workspace/in/shared/a/b", WAIT).size == 10
        guest.machine.close()
        assert (host / "new/out").read_bytes() == b"1234\n"

    def test_requests_do_not_write_to_a_read_only_directory_of_the_host(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        host = tmp_path / "shared"
        host.mkdir()
        (host / "f").write_text("as it was")
        channel = make(mounts=(Mount(host, "/workspace/shared"),)).start().channel
        assert channel.read_file("/workspace/shared/f", WAIT) == b"as it was"
        with pytest.raises(ChannelFault, match="Read-only file system") as caught:
            channel.write_file("/workspace/shared/f", b"x", WAIT)
        assert caught.value.reason == FaultReason.REFUSED
        with pytest.raises(ChannelFault, match="Read-only file system"):
            channel.mkdir("/workspace/shared/d", WAIT)
        assert [path.name for path in host.iterdir()] == ["f"]
        assert (host / "f").read_text() == "as it was"

    def test_requests_follow_no_link_in_a_directory_of_the_host(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        host = tmp_path / "shared"
        host.mkdir()
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/secret").write_text("x")
        (host / "folder").symlink_to("../outside")
        (host / "file").symlink_to("../outside/secret")
        mount = Mount(host, "/workspace/shared", writable=True)
        channel = make(mounts=(mount,)).start().channel
        for path in ("folder/secret", "file", "../secret"):
            with pytest.raises(ChannelFault):
                channel.read_file(f"/workspace/shared/{path}", WAIT)
            with pytest.raises(ChannelFault):
                channel.write_file(f"/workspace/shared/{path}", b"y", WAIT)
        assert (tmp_path / "outside/secret").read_text() == "x"

    def test_a_read_only_directory_that_is_missing_fails_the_start_with_its_name(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        guest = make(mounts=(Mount(tmp_path / "missing", "/workspace/shared"),))
        with pytest.raises(MachineError, match="missing"):
            guest.machine.start(WAIT)
        assert not (tmp_path / "missing").exists()
