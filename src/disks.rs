//! The disks that a host has defined: a file for each in `disks.d`, beside the configuration. Its name is the disk's, and what it sets are
//! options of `sealblk serve`.
//!
//! ```toml
//! # /etc/sealblk/disks.d/vm7.toml
//! blk-file = "/srv/vms/vm7.luks"
//! volume = "e2a81bd8-66d8-4f4d-9c2c-f6d4b3e9a001"
//! socket-group = "libvirt-qemu"
//! num-queues = 4
//! ```
//!
//! Where the disk has its sockets follows from its name, so that units, hooks and verbs find them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::LazyLock;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command};
use sealblk_base::blame::Blame;
use sealblk_secmem::private_file;
use sealblk_serve::command::Serve;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::error_chain::remedy;
use crate::parsing::{broken, rule};
use crate::toml_file::{self, TomlFileError};

/// The directory of the definitions, beside the configuration.
const DIRECTORY: &str = "disks.d";
const EXTENSION: &str = "toml";

/// Options of `sealblk serve` that belong to one start of it, or follow from the disk's name.
const NOT_OF_A_DISK: [&str; 10] = [
    "socket-path",
    "control-socket",
    "fd",
    "print-capabilities",
    "null-storage",
    "incoming",
    "no-wait",
    "take-over",
    "upgrade",
    "help",
];

/// The name of a disk: it is also the name of its file, of its directory of sockets, and of the instance of its unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskName(String);

impl FromStr for DiskName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_name = text.bytes().all(is_of_name) && text.len() <= 64;
        match is_name && text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            true => Ok(Self(text.to_owned())),
            false => Err(
                "a disk's name has up to 64 letters, digits, '-', '_' and '.', and begins with a letter or a digit"
                    .to_owned(),
            ),
        }
    }
}

impl Serialize for DiskName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a disk's definition cannot be used, or written.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// The file.
    #[error(transparent)]
    File(#[from] TomlFileError),
    /// There is none.
    #[error("there is no disk {name:?} on this host: {} does not exist; make it with `sealblk define`", path.display())]
    Missing {
        /// The disk.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// There is one already.
    #[error("the disk {name:?} is defined already, by {}; edit that file, or run `sealblk undefine {name}` first", path.display())]
    Exists {
        /// The disk.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// The definitions cannot be listed.
    #[error("cannot list {}{}", path.display(), remedy(source))]
    List {
        /// The directory.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// The disk is nowhere, or where a process is started decides where.
    #[error("{}: {option} must be set to an absolute path", path.display())]
    NoPath {
        /// The file.
        path: PathBuf,
        /// Which option.
        option: &'static str,
    },
    /// An option that is not one of a disk.
    #[error("--{option} cannot be in a disk's definition: {reason}")]
    NotOfADisk {
        /// Which option.
        option: String,
        /// Why not.
        reason: &'static str,
    },
    /// It cannot be written.
    #[error("cannot write {}{}", path.display(), remedy(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

impl DefinitionError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::File(error) => error.blame(),
            Self::Missing { .. } | Self::NoPath { .. } | Self::NotOfADisk { .. } => Blame::Operator,
            Self::Exists { .. } => Blame::Use,
            Self::Write { .. } | Self::List { .. } => Blame::Storage,
        }
    }
}

/// The disks of a host.
#[derive(Debug)]
pub struct Disks {
    directory: PathBuf,
}

/// What a definition sets.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Definition {
    options: BTreeMap<DiskOption, Setting>,
}

/// An option of `sealblk serve` that a disk can have, without its hyphens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DiskOption(&'static str);

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "an option is true, a number or a text")]
enum Setting {
    Flag(bool),
    Number(u64),
    Text(String),
}

static OPTIONS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let serve = Serve::augment_args(Command::new("serve"));
    let long = serve.get_arguments().filter_map(|option| option.get_long());
    let of_disks = long.filter(|name| !NOT_OF_A_DISK.contains(name));
    of_disks.map(str::to_owned).collect()
});

impl DiskOption {
    const BLK_FILE: Self = Self("blk-file");
    const HEADER: Self = Self("header");
    const VOLUME: Self = Self("volume");
    const PEER_FILE: Self = Self("peer-file");
    const SOCKET_GROUP: Self = Self("socket-group");
    const SOCKET_MODE: Self = Self("socket-mode");
    const ALLOW_UNENCRYPTED: Self = Self("allow-unencrypted");

    fn find(name: &str) -> Option<Self> {
        OPTIONS
            .iter()
            .find(|known| *known == name)
            .map(|known| Self(known))
    }
}

impl<'de> Deserialize<'de> for DiskOption {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::find(&name).ok_or_else(|| broken(rule::DISK_OPTION))
    }
}

impl Disks {
    /// Those of the host with the configuration at `config`.
    pub fn beside(config: &Path) -> Self {
        let directory = config.parent().unwrap_or(Path::new("")).join(DIRECTORY);
        Self { directory }
    }

    /// The file that defines a disk.
    pub fn path(&self, name: &DiskName) -> PathBuf {
        self.directory.join(format!("{name}.{EXTENSION}"))
    }

    /// Whether the host has defined such a disk.
    pub fn has(&self, name: &DiskName) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    /// The names of all disks, in order.
    ///
    /// # Errors
    /// [`DefinitionError`], if the directory cannot be read.
    pub fn names(&self) -> Result<Vec<DiskName>, DefinitionError> {
        let failed = |source| DefinitionError::List {
            path: self.directory.clone(),
            source,
        };
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = PathBuf::from(entry.map_err(failed)?.file_name());
            // An editor's copies are no disks.
            let stem = file.file_stem().and_then(|stem| stem.to_str());
            let stem = stem.filter(|_| file.extension().is_some_and(|extension| extension == EXTENSION));
            names.extend(stem.and_then(|name| name.parse().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Adds an option to the definition of a disk, unless it has that.
    ///
    /// # Errors
    /// [`DefinitionError`]; the definition is as before then.
    pub fn accept_only_registered(&self, name: &DiskName) -> Result<bool, DefinitionError> {
        let definition = self.definition(name)?;
        if definition.options.contains_key(&DiskOption::PEER_FILE) {
            return Ok(false);
        }
        let path = self.path(name);
        let DiskOption(option) = DiskOption::PEER_FILE;
        let file = toml::Value::from(Sockets::of(name).peer().display().to_string());
        let add = || {
            // What an operator has written stays as it is.
            let mut text = fs::read_to_string(&path)?;
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&format!("{option} = {file}\n"));
            private_file::replace(&path, text.as_bytes())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
        };
        match add() {
            Ok(()) => Ok(true),
            Err(source) => Err(DefinitionError::Write { path, source }),
        }
    }

    /// Removes the definition of a disk.
    ///
    /// # Errors
    /// [`DefinitionError`], if there is none, or it cannot be removed.
    pub fn undefine(&self, name: &DiskName) -> Result<(), DefinitionError> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => DefinitionError::Missing {
                name: name.to_string(),
                path,
            },
            _ => DefinitionError::Write { path, source },
        })
    }

    /// The definition of a disk.
    ///
    /// # Errors
    /// [`DefinitionError`], if there is none, or it cannot be used.
    pub fn definition(&self, name: &DiskName) -> Result<Definition, DefinitionError> {
        let path = self.path(name);
        let Some(options) = toml_file::read(&path)? else {
            return Err(DefinitionError::Missing {
                name: name.to_string(),
                path,
            });
        };
        let definition = Definition { options };
        for option in [DiskOption::BLK_FILE, DiskOption::HEADER] {
            let is_absolute = match definition.options.get(&option) {
                Some(Setting::Text(disk)) => Path::new(disk).is_absolute(),
                Some(_) => false,
                None => option != DiskOption::BLK_FILE,
            };
            if !is_absolute {
                let option = option.0;
                return Err(DefinitionError::NoPath { path, option });
            }
        }
        Ok(definition)
    }

    /// Writes the definition of a disk that has none.
    ///
    /// # Errors
    /// [`DefinitionError`], if it has one, or it cannot be written.
    pub fn define(&self, name: &DiskName, definition: &Definition) -> Result<PathBuf, DefinitionError> {
        let path = self.path(name);
        let write = || {
            // It holds no secret, and a disk may be served by a user of its own.
            fs::create_dir_all(&self.directory)?;
            private_file::create(&path, definition.to_string().as_bytes())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
        };
        match write() {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(DefinitionError::Exists {
                name: name.to_string(),
                path,
            }),
            Err(source) => Err(DefinitionError::Write { path, source }),
        }
    }
}

impl Definition {
    /// What `options` of `sealblk serve` on a command line say.
    ///
    /// # Errors
    /// What clap says of them. Within that: one that no definition can have.
    pub fn of_options(options: &[OsString]) -> Result<Result<Self, DefinitionError>, clap::Error> {
        let command = || {
            let command = Command::new("sealblk define NAME").no_binary_name(true);
            Serve::augment_args(command).mut_group("endpoint", |group| group.required(false))
        };
        // First without its rules on what goes together, as some options ask for sockets.
        let given = command().ignore_errors(true).try_get_matches_from(options)?;
        let is_given = |matches: &ArgMatches, argument: &Arg| {
            matches.value_source(argument.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        let named: Vec<_> = command()
            .get_arguments()
            .filter(|argument| is_given(&given, argument))
            .filter_map(|argument| argument.get_long().map(str::to_owned))
            .collect();
        if let Some(other) = named.iter().find(|name| DiskOption::find(name).is_none()) {
            return Ok(Err(DefinitionError::NotOfADisk {
                option: other.clone(),
                reason: "it belongs to one start of the disk, or follows from the disk's name",
            }));
        }
        // One that may be none has no control socket.
        let encrypted = !named.iter().any(|name| name == DiskOption::ALLOW_UNENCRYPTED.0);
        let sockets = ["--socket-path=disk.sock", "--control-socket=control.sock"].map(OsString::from);
        let sockets = sockets.iter().take(if encrypted { 2 } else { 1 });
        let mut command = command();
        let matches = command.try_get_matches_from_mut(options.iter().chain(sockets))?;
        let mut definition = Self::default();
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            let Some(long) = argument.get_long().filter(|_| is_given(&matches, argument)) else {
                continue;
            };
            let Some(option) = DiskOption::find(long) else {
                continue; // the sockets
            };
            let given = matches.get_raw(id).and_then(|mut values| values.next());
            let setting = match given.map(|value| value.to_str()) {
                Some(Some(path)) if [DiskOption::BLK_FILE, DiskOption::HEADER].contains(&option) => {
                    // It holds wherever the disk is started.
                    let path = std::path::absolute(path).ok();
                    Setting::Text(
                        path.and_then(|path| path.into_os_string().into_string().ok())
                            .unwrap_or_default(),
                    )
                }
                _ if !argument.get_action().takes_values() => Setting::Flag(true),
                Some(Some(text)) => match text.parse::<u64>() {
                    // A serial can begin with a zero.
                    Ok(number) if number.to_string() == text => Setting::Number(number),
                    _ => Setting::Text(text.to_owned()),
                },
                _ => {
                    return Ok(Err(DefinitionError::NotOfADisk {
                        option: long.to_owned(),
                        reason: "its value is not UTF-8",
                    }));
                }
            };
            definition.options.insert(option, setting);
        }
        Ok(Ok(definition))
    }

    fn path(&self, option: DiskOption) -> Option<PathBuf> {
        match self.options.get(&option) {
            Some(Setting::Text(path)) => Some(PathBuf::from(path)),
            _ => None,
        }
    }

    /// The disk's file or device.
    pub fn disk(&self) -> PathBuf {
        self.path(DiskOption::BLK_FILE).unwrap_or_default()
    }

    /// The file that holds the header, if it is detached.
    pub fn header(&self) -> Option<PathBuf> {
        self.path(DiskOption::HEADER)
    }

    /// The volume that the disk has to hold, if the definition says that.
    pub fn volume(&self) -> Option<Uuid> {
        match self.options.get(&DiskOption::VOLUME) {
            Some(Setting::Text(uuid)) => uuid.parse().ok(),
            _ => None,
        }
    }

    /// Whether the disk is to be a volume, and the definition does not say which.
    pub fn lacks_volume(&self) -> bool {
        let says = |option| self.options.contains_key(&option);
        !says(DiskOption::VOLUME) && !self.may_be_unencrypted()
    }

    /// Whether the disk need not be a volume: then it has no control socket.
    pub fn may_be_unencrypted(&self) -> bool {
        self.options.get(&DiskOption::ALLOW_UNENCRYPTED) == Some(&Setting::Flag(true))
    }

    /// Has the disk be served only while it holds this volume.
    pub fn set_volume(&mut self, volume: Uuid) {
        let volume = Setting::Text(volume.to_string());
        self.options.insert(DiskOption::VOLUME, volume);
    }

    /// The same for a socket that somebody else has bound, and given a group and a mode.
    pub fn arguments_without_socket(&self) -> Vec<OsString> {
        let of_socket = [DiskOption::SOCKET_GROUP, DiskOption::SOCKET_MODE];
        let mut options = self.options.clone();
        options.retain(|option, _| !of_socket.contains(option));
        Self { options }.arguments()
    }

    /// The group and the mode of the socket for QEMU.
    pub fn socket(&self) -> [Option<String>; 2] {
        [DiskOption::SOCKET_GROUP, DiskOption::SOCKET_MODE].map(|option| match self.options.get(&option)? {
            Setting::Text(text) => Some(text.clone()),
            Setting::Number(number) => Some(number.to_string()),
            Setting::Flag(_) => None,
        })
    }

    /// The arguments of `sealblk serve`.
    pub fn arguments(&self) -> Vec<OsString> {
        let argument = |(option, setting): (&DiskOption, &Setting)| {
            let DiskOption(name) = option;
            match setting {
                Setting::Flag(true) => Some(format!("--{name}")),
                Setting::Flag(false) => None,
                Setting::Number(number) => Some(format!("--{name}={number}")),
                Setting::Text(text) => Some(format!("--{name}={text}")),
            }
        };
        self.options
            .iter()
            .filter_map(argument)
            .map(OsString::from)
            .collect()
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# Options of `sealblk serve`; see `sealblk serve --help`.")?;
        for (DiskOption(name), setting) in &self.options {
            let value = match setting {
                Setting::Flag(is_set) => toml::Value::from(*is_set),
                Setting::Number(number) => match i64::try_from(*number) {
                    Ok(number) => toml::Value::from(number),
                    Err(_) => toml::Value::from(number.to_string()),
                },
                Setting::Text(text) => toml::Value::from(text.as_str()),
            };
            writeln!(f, "{name} = {value}")?;
        }
        Ok(())
    }
}

/// Where a disk has its sockets.
#[derive(Debug)]
pub struct Sockets {
    /// The directory of the disk, which is root's.
    pub directory: PathBuf,
    /// For QEMU.
    pub front_end: PathBuf,
    /// For operators, in a directory of the user who serves the disk.
    pub control: PathBuf,
}

impl Sockets {
    /// Where the front-end is registered that may have the disk.
    pub fn peer(&self) -> PathBuf {
        self.directory.join("peer")
    }

    /// A file that is there while the disk's processes are to accept the other side of a migration.
    pub fn incoming(&self) -> PathBuf {
        self.directory.join("incoming")
    }

    /// The directory that has one for each disk, with its sockets.
    pub const DIRECTORY: &str = "/run/sealblk";

    /// Those of the disk `name`.
    pub fn of(name: &DiskName) -> Self {
        let directory = Path::new(Self::DIRECTORY).join(&name.0);
        Self {
            front_end: directory.join("disk.sock"),
            control: directory.join("control/control.sock"),
            directory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(options: &[&str]) -> Vec<OsString> {
        options.iter().map(OsString::from).collect()
    }

    fn of(options: &[&str]) -> Definition {
        Definition::of_options(&given(options)).unwrap().unwrap()
    }

    #[test]
    fn what_was_defined_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::beside(&dir.path().join("config.toml"));
        let vm7: DiskName = "vm7".parse().unwrap();
        let options = [
            "--blk-file=/srv/a \"b\"\\.luks",
            "--discard",
            "--num-queues=4",
            "--on-full=report",
            "--serial=0012",
            "--socket-group=kvm",
        ];
        let defined = of(&options);
        let path = disks.define(&vm7, &defined).unwrap();
        assert_eq!(path, dir.path().join("disks.d/vm7.toml"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(disks.definition(&vm7).unwrap(), defined);
        assert_eq!(defined.arguments(), given(&options));

        let again = disks.define(&vm7, &of(&["--blk-file=/srv/b"])).unwrap_err();
        assert!(matches!(again, DefinitionError::Exists { .. }), "{again}");
        assert_eq!(disks.definition(&vm7).unwrap(), defined);
        let unknown = disks.definition(&"vm8".parse().unwrap()).unwrap_err();
        assert!(matches!(unknown, DefinitionError::Missing { .. }), "{unknown}");
    }

    #[test]
    fn a_disk_is_where_it_is_wherever_it_is_started() {
        let here = std::env::current_dir().unwrap().join("a.luks");
        assert_eq!(
            (of(&["--blk-file", "a.luks"]).disk(), here.is_absolute()),
            (here, true)
        );
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::beside(&dir.path().join("config.toml"));
        fs::create_dir(dir.path().join(DIRECTORY)).unwrap();
        for text in [
            "",
            "blk-file = 'a.luks'",
            "blk-file = '/a'\nheader = 'h'",
            "blk-file = 7",
        ] {
            fs::write(dir.path().join("disks.d/a.toml"), text).unwrap();
            let error = disks.definition(&"a".parse().unwrap()).unwrap_err();
            assert!(matches!(error, DefinitionError::NoPath { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn what_belongs_to_one_start_is_in_no_definition() {
        for options in [
            ["--blk-file=/a", "--incoming"],
            ["--blk-file=/a", "--take-over=7"],
            ["--blk-file=/a", "--fd=3"],
        ] {
            let refused = Definition::of_options(&given(&options)).unwrap().unwrap_err();
            assert!(
                matches!(refused, DefinitionError::NotOfADisk { .. }),
                "{options:?}: {refused}"
            );
        }
        // What `sealblk serve` refuses.
        for options in [
            vec!["--num-queues=4"],
            vec!["--blk-file=/a", "--num-queues=0"],
            vec!["--blk-file=/a", "--colour=red"],
            vec!["--blk-file=/a", "--read-only", "--discard"],
        ] {
            Definition::of_options(&given(&options)).unwrap_err();
        }

        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::beside(&dir.path().join("config.toml"));
        fs::create_dir(dir.path().join(DIRECTORY)).unwrap();
        for (text, place) in [
            ("blk-file = '/a'\nincoming = true", "line 2, column 1"),
            ("blk-file = '/a'\nsecret7 = 1", "line 2, column 1"),
            ("blk-file = ['/a']", "line 1, column 12"),
        ] {
            fs::write(dir.path().join("disks.d/a.toml"), text).unwrap();
            let error = disks.definition(&"a".parse().unwrap()).unwrap_err();
            let told = sealblk_command::output::told(&error);
            assert!(
                told.contains(place) && !told.contains("secret7"),
                "{text}: {told}"
            );
        }
    }

    #[test]
    fn a_name_leads_to_no_other_directory() {
        for name in ["vm7", "7", "web-1.example_a", &"a".repeat(64)] {
            assert_eq!(name.parse::<DiskName>().unwrap().to_string(), name);
        }
        for name in [
            "",
            ".",
            "..",
            "../a",
            "a/b",
            "/a",
            "-a",
            "a b",
            "a\n",
            "ä",
            &"a".repeat(65),
        ] {
            name.parse::<DiskName>().unwrap_err();
        }
    }
}
