//! `sealblk serve`: one disk, one process, until SIGTERM. It follows QEMU's "Backend program conventions".

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use base16ct::lower;
use rustix::event::{EventfdFlags, eventfd};
use sealblk_command::executable;
use sealblk_command::host_args::HostArgs;
use sealblk_command::secret::{SecretError, SecretSource};
use sealblk_command::size::Size;
use sealblk_command::socket_args::{Group, is_same_socket, warn_of_others};
use sealblk_command::{output, process, stderr};
use sha2::{Digest, Sha256};

use super::COMMAND;
use super::arguments::Serve;
use super::failure::Failure;
use crate::attachment::{Attachment, Before, By, HeaderClaim, Interface, KeyState, OpenError, Opener};
use crate::cipher::{KEY_LEN, Sector, SectorCipher, SectorSize};
use crate::closer::{self, ClosedElsewhere};
use crate::control::events::Event;
use crate::control::privilege::Grants;
use crate::control::server::Gate;
use crate::control::socket::{self, Bound, Permissions};
use crate::control::{datagram, manager, server, varlink};
use crate::device::{Claims, DEFAULT_POOL_PAGES, Disk, Endpoint, Peers, Server, Waited};
use crate::key_helper::{KeyHelper, Settings};
use crate::keys::RequestPurpose;
use crate::luks2::{Changed, HeaderError, Identity, Locked, MATERIAL_LEN, Reason, VolumeError};
use crate::map::{SegmentTable, Treatment, unencrypted};
use crate::sandbox::{self, Allowed, Measure, Sandbox};
use crate::storage::{
    Access, Attached, Backing, DataFile, Fence, Kind, Others, Policy, StorageError, ThisHost,
};
use crate::upgrade::{Giver, Origin, Taker};
use sealblk_secmem::{arena, arena::SecretBytes};
use serde_json::json;

/// What QEMU's vhost-user.json names, and nothing more (`VHostUserBackendBlockFeature`).
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

impl Serve {
    pub(super) fn run(self, host: &HostArgs) -> Result<(), Failure> {
        if self.print_capabilities {
            return output::print(&format!("{CAPABILITIES}\n"));
        }
        if let Some(fd) = self.fd
            && self.passphrase_file == Some(SecretSource::Descriptor(fd))
        {
            return Err(Failure::SameDescriptor { fd });
        }
        if let (Some(front_ends), Some(control)) = (&self.socket_path, &self.control_socket)
            && is_same_socket(front_ends, control)
        {
            return Err(Failure::SameSocket {
                path: front_ends.clone(),
            });
        }
        process::raise_descriptor_limit();
        let origin = Origin::of_this(UPGRADE);
        let taker = self.taker()?;
        let by = match &self.passphrase_file {
            Some(source) => By::Passphrase {
                once: source.can_be_read_once(),
            },
            None => By::Providers,
        };
        // Before anything of the disk is read: a process that reads it starts no other.
        let helper = match self.needs_helper() {
            true => Some(self.key_helper(host)?),
            false => None,
        };
        closer::prepare();
        let access = if self.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let others = match self.incoming {
            true => Others::Accepted,
            false => Others::Refused,
        };
        let mut attached = Attached::to_nothing();
        let mut open = |path: &Option<PathBuf>| -> Result<Option<Backing>, Failure> {
            let Some(path) = path else { return Ok(None) };
            let backing = Backing::open(path, access).map_err(|error| match error {
                source @ StorageError::WriteProtected { .. } => Failure::WriteProtected { source },
                error => error.into(),
            })?;
            if taker.is_none() {
                attached.add(backing.attach(others)?);
            }
            Ok(Some(backing))
        };
        let (backing, header) = (open(&self.blk_file)?, open(&self.header)?);
        let fence = attached.fence();
        let claims = match self.incoming || taker.is_some() {
            true => Claims::later(attached),
            false => Claims::now(attached)?,
        };
        let groups = self.groups(helper.as_ref())?;
        let medium = match (backing, helper, self.null_storage) {
            (_, _, Some(size)) => self.null(size)?,
            (Some(disk), Some(helper), None) => self.stored(helper, by, (disk, header), &fence)?,
            _ => unreachable!("clap asks for one of them, and a disk has a helper"),
        };
        let disk = Arc::new(self.disk(&medium, claims)?);
        // All that can fail is tried before a key is asked for, which other hosts and logs may hear of.
        // From here on threads do not get the signals that end the process.
        let endpoint = match taker {
            Some(_) => Endpoint::OtherProcess(self.socket_path.clone()),
            None => self.endpoint(groups.socket),
        };
        let mut server = Server::new(Arc::clone(&disk), self.num_queues, endpoint)?;
        if let Some(file) = &self.peer_file {
            server = server.only(Peers::in_file(file.clone()));
        }
        if let Some(taker) = &taker {
            taker.check(&disk, self.num_queues)?;
        }
        let control = self.control_socket(&medium, groups.control_socket)?;
        if let Key::Volume { .. } = &medium.key {
            arena::reserve(&SECRETS).map_err(SecretError::from)?;
        }
        let allowed = self
            .allowed(&medium, &server, control.as_ref())
            .map_err(Failure::Host)?;
        let served = match medium.key {
            Key::Volume { opener, identity } => {
                let header = opener.header.as_ref().unwrap_or(&opener.disk);
                let claim = HeaderClaim::new(header, self.header_claim, self.take_over);
                Some(Attachment::new(*opener, Arc::clone(&disk), identity, claim))
            }
            Key::Known { table } => {
                disk.unlock(table);
                None
            }
        };
        if let (Some(served), false, None) = (&served, self.incoming, &taker) {
            served.claim_header()?;
        }
        let result = self.serve(
            server,
            &medium.shape,
            served.as_ref(),
            control,
            allowed,
            (taker, origin),
        );
        match (&served, &result) {
            // The disk stays attached, by another process.
            (_, Ok(true)) | (None, _) => {}
            // Also if it was stopped, or failed, while it got its key: else the agent takes it for one that was killed.
            (Some(served), _) => served.detach(),
        }
        result.map(drop)
    }

    /// Confines the process, and serves the disk until the end; whether another process serves it then.
    fn serve(
        &self,
        mut server: Server,
        shape: &Shape,
        served: Option<&Arc<Attachment>>,
        mut control: Option<ControlSocket>,
        mut allowed: Allowed,
        (taker, origin): (Option<Taker>, Origin),
    ) -> Result<bool, Failure> {
        manager::connect();
        allowed.connect(server.settle().map_err(Failure::Host)?);
        // From here on there are threads.
        let sandbox = self.sandbox.enter(&allowed)?;
        if sandbox.in_force.contains(&Measure::SystemCalls) {
            datagram::keep_connections();
        }
        stderr::begin();
        sandbox::tell_of_refusals().map_err(Failure::Host)?;
        if !self.incoming && taker.is_none() {
            server.disk().ask_for_claim().map_err(Failure::Host)?;
        }
        let before = match (taker, served, &mut control) {
            (Some(taker), Some(served), Some(control)) => {
                match self.take_over(taker, &mut server, served, control)? {
                    Some(before) => Some(before),
                    None => return Ok(false),
                }
            }
            _ => {
                // A guest that has migrated to a locked disk could not go back.
                let may_wait = !self.no_wait && !self.incoming;
                if let Some(served) = served
                    && self.get_key(&server, served, may_wait)? == Waited::Stopped
                {
                    return Ok(false);
                }
                None
            }
        };
        self.announce(shape);
        if let Some(served) = served {
            served.begin();
        }
        manager::ready(&served.map_or("serving".to_owned(), |served| served.standing()));
        match (served, control) {
            (Some(served), Some(control)) => control.run_with(
                server,
                served,
                Started {
                    sandbox,
                    before,
                    origin,
                    queues: self.num_queues,
                },
            ),
            _ => server.run().map_err(Failure::from),
        }
    }

    /// The way to the process from which this one is to take the disk over.
    fn taker(&self) -> Result<Option<Taker>, Failure> {
        let (Some(upgrade), Some(socket)) = (self.upgrade, &self.control_socket) else {
            return Ok(None);
        };
        // This process does not end with the terminal of `sealblk upgrade`.
        let _ = rustix::process::setsid();
        Ok(Some(Taker::connect(socket, upgrade)?))
    }

    /// Gets the key, if the disk has it, then takes the disk over. Nothing comes back if this process was told to end.
    fn take_over(
        &self,
        taker: Taker,
        server: &mut Server,
        served: &Arc<Attachment>,
        control: &mut ControlSocket,
    ) -> Result<Option<Before>, Failure> {
        let waited = match taker.key() {
            KeyState::Open => self.get_key(server, served, false)?,
            KeyState::NoKey => self.get_key(server, served, true)?,
            KeyState::LockedByOperator => {
                served.watch_helper().map_err(Failure::Host)?;
                Waited::Came
            }
        };
        if waited == Waited::Stopped {
            return Ok(None);
        }
        let took = taker.take(served, server)?;
        server.take_name(took.front_ends_name);
        control.bound.take(took.control_name);
        control.listener = Some(took.control.into());
        let _ = output::line::<Failure>(TAKEN_OVER);
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let pause = milliseconds(took.pause);
        tracing::info!(
            milliseconds = pause,
            drain = milliseconds(took.drain),
            "took the disk over; the guest's requests waited no longer than this, first until those in flight had ended"
        );
        served.tell(
            Event::DiskTakenOver,
            json!({
                "process": std::process::id(),
                "version": env!("CARGO_PKG_VERSION"),
                "pause": pause,
                "from": { "process": took.before.process, "version": took.before.version },
            }),
        );
        Ok(Some(took.before))
    }

    /// Where front-ends come from: clap requires a path or a descriptor.
    fn endpoint(&self, group: Option<u32>) -> Endpoint {
        match (&self.socket_path, self.fd) {
            (None, Some(fd)) => Endpoint::Fd(fd),
            (path, _) => {
                let permissions = Permissions::new(self.socket_mode, group);
                warn_of_others(permissions);
                Endpoint::Path(path.clone().unwrap_or_default(), permissions)
            }
        }
    }

    /// Null storage has no keys, and a group's number needs no name service.
    fn needs_helper(&self) -> bool {
        self.null_storage.is_none() || matches!(self.socket_group, Some(Group::Name(_)))
    }

    /// The numbers of the groups that sockets get: this process loads no name service.
    fn groups(&self, helper: Option<&KeyHelper>) -> Result<Groups, Failure> {
        let number = |option, group: &Option<Group>| match (group, helper) {
            (Some(Group::Number(number)), _) => Ok(Some(*number)),
            (Some(Group::Name(name)), Some(helper)) => {
                let asked = helper.group(name).map(Some);
                asked.map_err(|error| Failure::Group {
                    option,
                    source: Box::new(error.into()),
                })
            }
            (Some(Group::Name(_)), None) | (None, _) => Ok(None),
        };
        Ok(Groups {
            socket: number("--socket-group", &self.socket_group)?,
            control_socket: number("--control-socket-group", &self.control_socket_group)?,
        })
    }

    /// Starts the process that gets the keys.
    fn key_helper(&self, host: &HostArgs) -> Result<KeyHelper, Failure> {
        let source = self.passphrase_file.as_ref();
        let settings = Settings {
            executable: executable::find(COMMAND)?,
            state_dir: host.state_dir.clone(),
            config: host.config.clone(),
            passphrase: source.map(SecretSource::argument),
            inherited: source.map_or(Ok(Vec::new()), SecretSource::inherited)?,
        };
        KeyHelper::start(settings).map_err(Failure::StartHelper)
    }

    /// Binds the control socket, if there is to be one.
    fn control_socket(&self, medium: &Medium, group: Option<u32>) -> Result<Option<ControlSocket>, Failure> {
        let (Some(path), Key::Volume { opener, .. }) = (&self.control_socket, &medium.key) else {
            return Ok(None);
        };
        let grants = opener.helper.grants()?;
        let mode = self.control_socket_mode.unwrap_or(CONTROL_MODE);
        if self.upgrade.is_some() {
            let bound = Bound::of_other(path).map_err(Failure::Host)?;
            return Ok(Some(ControlSocket {
                listener: None,
                grants,
                bound,
            }));
        }
        let permissions = Permissions::new(Some(mode), group);
        let (listener, bound) = socket::bind(path, permissions)?;
        Ok(Some(ControlSocket {
            listener: Some(listener.into()),
            grants,
            bound,
        }))
    }

    /// The files that this process opens once it is confined.
    fn allowed(
        &self,
        medium: &Medium,
        server: &Server,
        control: Option<&ControlSocket>,
    ) -> io::Result<Allowed> {
        let mut allowed = Allowed::default();
        if let Some(file) = &self.peer_file {
            // It is written anew for each front-end, whose control group is in /proc.
            allowed.read(file.parent().unwrap_or(Path::new("/")));
            allowed.read(Path::new("/proc"));
        }
        // Each queue opens it for itself.
        let file = &medium.shape.file;
        allowed.reopen(file, file.is_null() || !self.read_only)?;
        if let Key::Volume { opener, .. } = &medium.key {
            let header = opener.header.as_ref().unwrap_or(&opener.disk);
            // Each claim opens a device with O_EXCL.
            if header.kind() == Kind::BlockDevice {
                allowed.reopen(header.file(), !self.read_only)?;
            }
            if let Some(directory) = header.lock_files() {
                allowed.lock_files_in(directory);
            }
        }
        // Sockets go with the process.
        for bound in [server.bound(), control.map(|control| &control.bound)]
            .into_iter()
            .flatten()
        {
            allowed.remove_from(bound.directory())?;
        }
        // The kind and the size of memory that a front-end passes.
        for device in fs::read_dir("/sys/bus/dax/devices")
            .into_iter()
            .flatten()
            .flatten()
        {
            allowed.read(&device.path());
        }
        if self.passphrase_file.is_some() {
            // How much memory a passphrase's keyslot can take.
            for path in ["/proc/self", "/proc/meminfo", "/sys/fs/cgroup"] {
                allowed.read(path.as_ref());
            }
        }
        Ok(allowed)
    }

    /// Gets the key of `served`, or finds that the disk has to wait for it. A key server that does not answer holds up a guest
    /// no longer than [`FIRST_TRY`]: its disk is locked then.
    fn get_key(&self, server: &Server, served: &Arc<Attachment>, may_wait: bool) -> Result<Waited, Failure> {
        let first = served.get_key(may_wait).map_err(Failure::Host)?;
        let limit = may_wait.then_some(FIRST_TRY);
        let waited = server.wait_for(&first, limit).map_err(Failure::Host)?;
        match waited {
            Waited::Came => first.outcome()?,
            Waited::TooLong => {
                tracing::warn!(
                    "the key source has not answered yet: the disk is locked until the key is available"
                );
            }
            Waited::Stopped => tracing::info!("stopping"),
        }
        Ok(waited)
    }

    fn stored(
        &self,
        helper: KeyHelper,
        by: By,
        (disk, header): (Backing, Option<Backing>),
        fence: &Fence,
    ) -> Result<Medium, Failure> {
        let host = ThisHost::find().host;
        let opened = match &header {
            Some(header) => Locked::open_on(&host, header, Some(&disk)),
            None => Locked::open_on(&host, &disk, None),
        };
        match opened {
            Ok(locked) => {
                let volume = self.volume(&disk, &locked, fence)?;
                let with_header = header.as_ref().unwrap_or(&disk);
                let opened = helper.open(&with_header.reopen_to_read()?, with_header.path())?;
                let identity = locked.identity()?;
                // The helper reads the header after this process, and it may have been replaced between.
                let expected = identity.uuid();
                if opened != expected {
                    return Err(OpenError::from(Changed::Volume {
                        expected,
                        found: opened,
                    })
                    .into());
                }
                if let Some(expected) = self.volume
                    && identity.uuid() != expected
                {
                    return Err(Failure::OtherVolume {
                        disk: header.as_ref().unwrap_or(&disk).path().to_owned(),
                        expected,
                        found: identity.uuid(),
                    });
                }
                Ok(volume.of(Key::Volume {
                    identity,
                    opener: Box::new(Opener {
                        disk,
                        header,
                        host,
                        by,
                        purpose: match self.incoming {
                            true => RequestPurpose::Migrate,
                            false => RequestPurpose::Attach,
                        },
                        helper,
                        kernel: self.cipher_kernel,
                    }),
                }))
            }
            Err(volume) if header.is_none() && self.is_no_volume(&volume) => match self.allow_unencrypted {
                true => self.unencrypted(&disk, fence),
                false => Err(Failure::Unencrypted { volume }),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is none that sealblk could ever open.
    fn is_no_volume(&self, error: &VolumeError) -> bool {
        match &*error.reason {
            Reason::Header(HeaderError::NotLuks { .. }) => true,
            Reason::Header(HeaderError::Luks1) => self.format.is_some(),
            _ => false,
        }
    }

    /// What is known of the volume without its key.
    fn volume(&self, disk: &Backing, locked: &Locked<'_>, fence: &Fence) -> Result<Shape, Failure> {
        if self.sector_size.is_some() {
            return Err(Failure::SectorSizeOfVolume {
                disk: disk.path().to_owned(),
            });
        }
        if self.format.is_some() {
            return Err(Failure::FormatOfVolume {
                disk: disk.path().to_owned(),
            });
        }
        let sector_size = locked.sector_size();
        Ok(Shape {
            sectors: locked.capacity() / Sector::LEN,
            sector_size,
            file: Arc::new(
                disk.data_file(locked.layout().alignment(sector_size.bytes_u32()), fence)?
                    .with_policy(self.policy()),
            ),
            serial: locked.uuid().simple().to_string(),
        })
    }

    /// The disk as raw: it is not a volume.
    fn unencrypted(&self, disk: &Backing, fence: &Fence) -> Result<Medium, Failure> {
        if self.passphrase_file.is_some() {
            return Err(Failure::KeyOfPlainDisk {
                disk: disk.path().to_owned(),
            });
        }
        let sector_size = self.sector_size.unwrap_or_default();
        let table = unencrypted(disk, sector_size, self.format.is_some())?;
        tracing::warn!("not a LUKS2 volume: serving it as an unencrypted disk");
        let shape = Shape {
            sectors: table.sectors(),
            sector_size,
            file: Arc::new(
                disk.data_file(sector_size.bytes_u32(), fence)?
                    .with_policy(self.policy()),
            ),
            serial: serial_of_path(disk.path()),
        };
        Ok(shape.of(Key::Known { table }))
    }

    /// What becomes of reads and writes that storage fails.
    fn policy(&self) -> Policy {
        Policy {
            full: self.on_full,
            error: self.on_error,
        }
    }

    /// No disk: all but the storage.
    fn null(&self, Size(capacity): Size) -> Result<Medium, Failure> {
        let sector_size = self.sector_size.unwrap_or_default();
        if capacity == 0 || !capacity.is_multiple_of(sector_size.bytes_u32().into()) {
            return Err(Failure::NullStorage { sector_size });
        }
        let treatment = if self.allow_unencrypted {
            Treatment::Linear
        } else {
            let key = SecretBytes::random(KEY_LEN).map_err(SecretError::from)?;
            Treatment::Crypt(Arc::new(SectorCipher::new(
                &key,
                sector_size,
                self.cipher_kernel,
            )?))
        };
        tracing::warn!(
            encrypted = !self.allow_unencrypted,
            "null storage, for benchmarks: writes are discarded, and reads return noise"
        );
        let table = Arc::new(SegmentTable::whole(capacity, treatment));
        let shape = Shape {
            sectors: table.sectors(),
            sector_size,
            file: Arc::new(DataFile::null().map_err(Failure::Null)?),
            serial: "null".into(),
        };
        Ok(shape.of(Key::Known { table }))
    }

    /// Says that front-ends can connect.
    fn announce(&self, shape: &Shape) {
        let path = self.blk_file.as_ref().map(|path| path.display());
        tracing::info!(
            disk = path.map(tracing::field::display),
            capacity = shape.sectors * Sector::LEN,
            sector_size = shape.sector_size.bytes(),
            read_only = self.read_only,
            direct = shape.file.is_direct(),
            "serving"
        );
        if self.incoming {
            tracing::info!(
                "waiting for a guest that migrates here: until it runs here, the other sealblk can keep the disk"
            );
        }
    }

    fn disk(&self, medium: &Medium, claims: Claims) -> Result<Disk, Failure> {
        let shape = &medium.shape;
        if !shape.file.is_direct() {
            tracing::warn!(
                "the storage has no direct I/O with this sector size: data pass through the page cache"
            );
        }
        let discard = self.discard && takes_discards(&shape.file);
        let disk = Disk::new(
            shape.sectors,
            Arc::clone(&shape.file),
            claims,
            shape.sector_size,
            self.read_only,
            discard,
            self.serial.as_ref().unwrap_or(&shape.serial),
        );
        Ok(disk
            .map_err(Failure::Host)?
            .with_poll_max(Duration::from_micros(self.poll_max.into()))
            .with_stop_limit(Duration::from_secs(self.stop_timeout.into()))
            .with_pool_pages(self.pool_size.unwrap_or(DEFAULT_POOL_PAGES)))
    }
}

/// What `sealblk upgrade` adds to the arguments, and the line by which it learns that the disk was taken over.
pub(super) const UPGRADE: &str = "--upgrade=";
pub const TAKEN_OVER: &str = "taken over";

/// How long the first attempt to get a key can delay the guest.
const FIRST_TRY: Duration = Duration::from_secs(10);

/// What opening a volume takes of the key arena: keys, and the anti-forensic material of a keyslot.
const SECRETS: [usize; 2] = [4096, MATERIAL_LEN];

/// The control socket's mode, if the operator gives none: who is in its group may ask, and what for, the configuration grants.
const CONTROL_MODE: u32 = 0o660;

/// The groups of sockets, by number.
struct Groups {
    socket: Option<u32>,
    control_socket: Option<u32>,
}

/// A control socket that is bound, and goes with this.
struct ControlSocket {
    /// None before another process has given it.
    listener: Option<ClosedElsewhere<UnixListener>>,
    grants: Grants,
    bound: Bound,
}

impl ControlSocket {
    /// Serves, and answers on the control socket meanwhile. Tells whether another process serves the disk at the end.
    fn run_with(self, server: Server, served: &Arc<Attachment>, started: Started) -> Result<bool, Failure> {
        let Some(listener) = self.listener else {
            return Ok(server.run()?);
        };
        let Started { sandbox, before, .. } = started;
        let interface = Interface::new(Arc::clone(served), self.grants, sandbox, before);
        let gate = Arc::<Gate>::default();
        let giver = Giver {
            gate: Arc::clone(&gate),
            served: Arc::clone(served),
            handover: server.handover(),
            queues: started.queues,
            control: listener.as_fd().try_clone_to_owned().map_err(Failure::Host)?,
            origin: started.origin,
            front_ends_name: server.bound().and_then(Bound::inode),
            control_name: self.bound.inode(),
            current: Mutex::default(),
        };
        let interfaces: Arc<[Arc<dyn varlink::Interface>]> = Arc::new([Arc::new(interface), Arc::new(giver)]);
        let ended = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Failure::Host(error.into()))?;
        thread::scope(|scope| {
            let control = thread::Builder::new().name("control".into());
            let spawned = control.spawn_scoped(scope, || {
                if let Err(error) = server::run(&listener, &ended, &interfaces, &gate, None) {
                    tracing::error!(%error, "the control socket no longer works");
                }
            });
            spawned.map_err(Failure::Host)?;
            let result = server.run();
            let _ = rustix::io::write(&ended, &1_u64.to_ne_bytes());
            if matches!(result, Ok(true)) {
                self.bound.keep();
            }
            Ok(result?)
        })
    }
}

/// How this process was started, and what it is.
struct Started {
    sandbox: Sandbox,
    before: Option<Before>,
    origin: Origin,
    queues: u16,
}

/// The storage of a disk.
struct Medium {
    shape: Shape,
    key: Key,
}

/// What is known without a key.
struct Shape {
    sectors: u64,
    sector_size: SectorSize,
    file: Arc<DataFile>,
    /// The disk's serial, if the operator gives none.
    serial: String,
}

/// Where its segment table comes from.
enum Key {
    /// From the volume, which must be unlocked first.
    Volume { opener: Box<Opener>, identity: Identity },
    /// It is there, and stays.
    Known { table: Arc<SegmentTable> },
}

impl Shape {
    fn of(self, key: Key) -> Medium {
        Medium { shape: self, key }
    }
}

/// Whether the guest's discards can be passed on. Where they cannot, it is better off without them: that they fail, a guest
/// finds out with each of its file systems anew.
fn takes_discards(file: &DataFile) -> bool {
    match file.takes_discards() {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "--discard: this storage does not support discards, so the guest gets none");
            false
        }
    }
}

/// A plain disk has no name of its own. The path that it is given by is the operator's name for it: links are not
/// followed, since those of `/dev/disk` stay when the devices' numbers change.
fn serial_of_path(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    lower::encode_string(&Sha256::digest(path.as_os_str().as_bytes()))
}
