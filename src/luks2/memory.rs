//! The memory that is available to this process: its control group can have less than the host, and the kernel
//! kills a process that takes more than its group has.
//!
//! A group's limit holds for all groups below it, so this module reads the limit of each group, from this process' own up
//! to the highest visible one (the kernel's `cgroup-v2.rst` and `cgroup-v1/memory.rst`). In a container this is the root of
//! the container's tree.

use std::fs;
use std::path::{Path, PathBuf};

use sealblk_base::mounts::Mount;

/// Memory in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// What this process could have if nothing else ran.
    pub(crate) total: u64,
    /// What it can have now without another's being swapped out or ended.
    pub(crate) available: u64,
}

impl Memory {
    /// Of this process; nothing where nothing tells.
    pub(crate) fn of_this_process() -> Option<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
        let host = Self {
            total: line(&meminfo, "MemTotal:")?,
            available: line(&meminfo, "MemAvailable:")?,
        };
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = Mount::all();
        Some(host.within(own_groups(&groups, &mounts).iter().map(|group| group.memory())))
    }

    fn within(self, groups: impl Iterator<Item = Option<Self>>) -> Self {
        groups.flatten().fold(self, |least, group| Self {
            total: least.total.min(group.total),
            available: least.available.min(group.available),
        })
    }
}

/// A line of proc_meminfo(5).
fn line(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// The two forms in which the kernel tells of a group's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The directory of a group.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    dir: PathBuf,
    version: Version,
}

impl Group {
    /// What it has, if it has a limit.
    fn memory(&self) -> Option<Memory> {
        let number = |name: &str| {
            let text = fs::read_to_string(self.dir.join(name)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        // "max" is no number. Past its high mark, a group is made to wait for so long that it all but stands still.
        let (limits, usage, caches) = match self.version {
            Version::Two => (
                [number("memory.max"), number("memory.high")],
                "memory.current",
                ["inactive_file", "active_file"],
            ),
            Version::One => (
                [number("memory.limit_in_bytes"), None],
                "memory.usage_in_bytes",
                ["total_inactive_file", "total_active_file"],
            ),
        };
        let limit = limits.into_iter().flatten().min()?;
        let stat = fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let cached = |name: &str| {
            let line = stat
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
        };
        // Of what is in use, pages of files are given up first.
        let cached = caches.map(cached).into_iter().fold(0, u64::saturating_add);
        let in_use = number(usage)?.saturating_sub(cached);
        Some(Memory {
            total: limit / 1024,
            available: limit.saturating_sub(in_use) / 1024,
        })
    }
}

/// The groups that hold this process, as `groups`, its /proc/self/cgroup, and the mounts tell (cgroups(7)).
fn own_groups(groups: &str, mounts: &[Mount]) -> Vec<Group> {
    let lines = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        match controllers {
            "" => Some((Version::Two, path)),
            _ if controllers.split(',').any(|name| name == "memory") => Some((Version::One, path)),
            _ => None,
        }
    });
    let of_line = |(version, path): (Version, &str)| {
        let mount = mounts.iter().find(|mount| match version {
            Version::Two => mount.is("cgroup2"),
            Version::One => mount.is("cgroup") && mount.has_option("memory"),
        });
        mount.map_or_else(Vec::new, |mount| up_from(Path::new(path), mount, version))
    };
    lines.flat_map(of_line).collect()
}

/// The group at `path` and all above it that the mount shows.
fn up_from(path: &Path, mount: &Mount, version: Version) -> Vec<Group> {
    // A process that was moved out of what it sees is nowhere in the mount.
    let Ok(inside) = path.strip_prefix(&mount.root) else {
        return Vec::new();
    };
    let is_out = inside.components().any(|part| part.as_os_str() == "..");
    let above = inside.ancestors().filter(|_| !is_out);
    above
        .map(|part| Group {
            dir: mount.point.join(part),
            version,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(table: &str) -> Vec<Mount> {
        Mount::parse_all(table.as_bytes())
    }

    fn write(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    const HOST: Memory = Memory {
        total: 64 << 20,
        available: 32 << 20,
    };
    const MIB: u64 = 1 << 10;

    fn memory(groups: &str, table: &str) -> Memory {
        HOST.within(own_groups(groups, &mounts(table)).iter().map(Group::memory))
    }

    #[test]
    fn each_group_above_limits_those_below() {
        let dir = tempfile::tempdir().unwrap();
        let (at, root) = (dir.path(), dir.path().display());
        // As in a machine with systemd; in the root there are no limits.
        write(
            &at.join("vms.slice"),
            &[("memory.max", "2147483648\n"), ("memory.high", "max\n")],
        );
        write(
            &at.join("vms.slice"),
            &[
                ("memory.current", "1610612736\n"),
                (
                    "memory.stat",
                    "anon 5\ninactive_file 1048576\nactive_file 1048576\nfile 99\n",
                ),
            ],
        );
        let service = at.join("vms.slice/vm7.service");
        write(
            &service,
            &[
                ("memory.max", "max\n"),
                ("memory.current", "4096\n"),
                ("memory.stat", ""),
            ],
        );
        let groups = "0::/vms.slice/vm7.service\n";
        let table = format!("30 25 0:26 / {root} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate");
        let slice = Memory {
            total: 2048 * MIB,
            available: 514 * MIB,
        };
        assert_eq!(memory(groups, &table), slice);
        // Past the high mark it would stand still.
        write(&service, &[("memory.high", "268435456\n")]);
        let least = Memory {
            total: 256 * MIB,
            available: 256 * MIB - 4,
        };
        assert_eq!(memory(groups, &table), least);
        // One that is over its limit has nothing left.
        write(&service, &[("memory.current", "368435456\n")]);
        assert_eq!(memory(groups, &table).available, 0);
    }

    #[test]
    fn the_tree_of_a_container_begins_at_its_own_group() {
        let dir = tempfile::tempdir().unwrap();
        let (at, root) = (dir.path(), dir.path().display());
        write(
            at,
            &[
                ("memory.max", "536870912\n"),
                ("memory.high", "max\n"),
                ("memory.current", "0\n"),
                ("memory.stat", ""),
            ],
        );
        let half_a_gib = Memory {
            total: 512 * MIB,
            available: 512 * MIB,
        };
        // With a name space of its own, and with a mount of its part of the host's tree.
        for (groups, own) in [("0::/\n", "/"), ("0::/docker/abc\n", "/docker/abc")] {
            let table = format!("30 25 0:26 {own} {root} ro - cgroup2 cgroup rw");
            assert_eq!(memory(groups, &table), half_a_gib, "{groups}");
        }
        let table = format!("30 25 0:26 / {root} ro - cgroup2 cgroup rw");
        for elsewhere in ["0::/../other\n", "0::/docker/abc", "", "nonsense", "1:cpu:/\n"] {
            let expected = if elsewhere.starts_with("0::/docker") {
                half_a_gib
            } else {
                HOST
            };
            assert_eq!(memory(elsewhere, &table), expected, "{elsewhere}");
        }
    }

    #[test]
    fn groups_of_the_first_version_have_a_tree_for_each_controller() {
        let dir = tempfile::tempdir().unwrap();
        let (at, root) = (dir.path(), dir.path().display());
        write(
            &at.join("vm"),
            &[
                ("memory.limit_in_bytes", "1073741824\n"),
                ("memory.usage_in_bytes", "536870912\n"),
                (
                    "memory.stat",
                    "inactive_file 1\ntotal_inactive_file 268435456\ntotal_active_file 0\n",
                ),
            ],
        );
        write(
            at,
            &[
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.usage_in_bytes", "0\n"),
            ],
        );
        let groups = "9:name=systemd:/vm\n4:cpu,memory:/vm\n0::/\n";
        let table = format!(
            "30 25 0:26 / /nowhere rw - cgroup2 cgroup rw\n31 25 0:27 / /cpu rw - cgroup cgroup rw,cpuset\n\
             32 25 0:28 / {root} rw - cgroup cgroup rw,cpu,memory"
        );
        let expected = Memory {
            total: 1024 * MIB,
            available: 768 * MIB,
        };
        assert_eq!(memory(groups, &table), expected);
    }

    #[test]
    fn this_process_has_memory() {
        let memory = Memory::of_this_process().unwrap();
        assert!(
            memory.available > 0 && memory.total >= memory.available,
            "{memory:?}"
        );
    }
}
