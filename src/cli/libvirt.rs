//! `sealblk libvirt`: the disks of a domain, and the hook that starts and stops them with it.
//!
//! A domain names its disks in its metadata, under [`NAMESPACE`]. libvirt gives the hook the whole domain on standard input, and waits for it:
//! the domain is locked meanwhile, and `virsh list` waits for everybody. So the hook calls nothing of libvirt, and takes no longer than
//! [`PATIENCE`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand};
use sealblk_secmem::private_file;
use sealblk_serve::device::Registered;

use super::failure::Failure;
use super::{Host, output, units};
use crate::disks::{DiskName, Disks, Sockets};

/// The namespace of a domain's metadata.
const NAMESPACE: &str = "urn:sealblk:libvirt:1";
/// How long the hook may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// The longest domain that is read.
const LONGEST: u64 = 4 << 20;

const AFTER_HELP: &str = "\
Examples:
  sealblk libvirt attach vm7 vm7-data --target vdb
  sealblk libvirt detach vm7 vm7-data
  sealblk libvirt xml vm7-data --target vdb

A domain that has disks in this way names them in its metadata. libvirt's hook
(/etc/libvirt/hooks/qemu.d/sealblk) starts them when the domain starts, is restored or
migrates here, and stops them when it has ended. If a disk cannot be served, `virsh start`
fails with the reason. A disk that does not get its key at once keeps no domain from
starting: the guest's requests wait.";

/// Attach disks to domains of libvirt
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Libvirt {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Attach a disk to a domain, also while it runs
    Attach(Attach),
    /// Detach a disk from a domain, also while it runs
    Detach(Detach),
    /// Print the element of a disk for a domain's XML
    Xml(Xml),
    /// Undefine a domain and its disks; the disks stay as they are
    Undefine(Undefine),
    /// What libvirt's hook calls, with the domain on standard input
    #[command(hide = true)]
    Hook(Hook),
}

/// Which libvirt.
#[derive(Debug, Args)]
struct Connection {
    /// libvirt's connection URI, as for `virsh --connect` [default: virsh's]
    #[arg(long, value_name = "URI")]
    connect: Option<String>,
}

#[derive(Debug, Args)]
struct Attach {
    /// The domain
    domain: String,
    /// The disk's name (`sealblk define`)
    name: DiskName,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
struct Detach {
    /// The domain
    domain: String,
    /// The disk's name
    name: DiskName,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
struct Xml {
    /// The disk's name
    name: DiskName,
    #[command(flatten)]
    device: Device,
}

/// How the guest sees the disk.
#[derive(Debug, Args)]
struct Device {
    /// The disk's place in the domain, as 'vdb'
    #[arg(long, value_name = "DEV", value_parser = parse_target)]
    target: String,
    /// The number of its queues, at most that of the definition
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
}

#[derive(Debug, Args)]
struct Undefine {
    /// The domain
    domain: String,
    /// Also if the key agent cannot be asked
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    connection: Connection,
    /// Further options of `virsh undefine`, as --nvram
    #[arg(last = true)]
    options: Vec<String>,
}

#[derive(Debug, Args)]
struct Hook {
    /// The domain
    domain: String,
    /// What happens to it
    operation: String,
    /// Which part of that, and more (libvirt's hooks)
    #[arg(num_args = 0..)]
    rest: Vec<String>,
}

fn parse_target(text: &str) -> Result<String, String> {
    match text.starts_with("vd") && text.len() <= 8 && text.bytes().all(|byte| byte.is_ascii_lowercase()) {
        true => Ok(text.to_owned()),
        false => Err("it looks like 'vdb'".to_owned()),
    }
}

impl Libvirt {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        match self.verb {
            Verb::Attach(verb) => verb.run(host),
            Verb::Detach(verb) => verb.run(),
            Verb::Xml(verb) => {
                host.disks().definition(&verb.name)?;
                output::print(&verb.device.element(&verb.name))
            }
            Verb::Undefine(verb) => verb.run(host),
            Verb::Hook(verb) => verb.run(&host.disks()),
        }
    }
}

impl Device {
    fn element(&self, name: &DiskName) -> String {
        element(name, &self.target, self.queues)
    }
}

fn element(name: &DiskName, target: &str, queues: u16) -> String {
    let path = Sockets::of(name).front_end;
    format!(
        "<disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw' queues='{queues}'/>\n  <source type='unix' path='{}'>\n    \
         <reconnect enabled='yes' timeout='1'/>\n  </source>\n  <target dev='{target}' bus='virtio'/>\n</disk>\n",
        path.display()
    )
}

impl Connection {
    /// What `virsh` prints with these arguments, and `input` as its standard input.
    fn virsh(&self, args: &[&str], input: &str) -> Result<String, Failure> {
        let mut virsh = Command::new("virsh");
        virsh.env("LC_ALL", "C").arg("--quiet");
        virsh.args(self.connect.iter().flat_map(|uri| ["--connect", uri]));
        virsh
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut run = || {
            let mut child = virsh.spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(input.as_bytes())?;
            }
            child.wait_with_output()
        };
        let output = run().map_err(|source| Failure::NoVirsh { source })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(Failure::Virsh {
                verb: args.first().copied().unwrap_or_default().to_owned(),
                said,
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The domain as it is defined, or the only way that it is.
    fn domain(&self, domain: &str) -> Result<Domain, Failure> {
        let is_active = self.virsh(&["domstate", domain], "")?.trim() != "shut off";
        let is_persistent = self
            .virsh(&["dominfo", domain], "")?
            .lines()
            .any(|line| line.strip_prefix("Persistent:").map(str::trim) == Some("yes"));
        let mut dump = vec!["dumpxml", domain];
        dump.extend(is_persistent.then_some("--inactive"));
        let xml = self.virsh(&dump, "")?;
        let running = match is_active {
            true => Some(registered(&self.virsh(&["dumpxml", domain], "")?)?),
            false => None,
        };
        let mut scope = Vec::new();
        scope.extend(is_persistent.then_some("--config"));
        scope.extend(is_active.then_some("--live"));
        Ok(Domain {
            disks: disks_of(&xml)?,
            devices: devices_of(&xml)?,
            running,
            scope,
        })
    }

    /// Names the disks of a domain in its metadata.
    fn set_disks(&self, domain: &str, scope: &[&str], disks: &BTreeSet<DiskName>) -> Result<(), Failure> {
        let mut set = vec!["metadata", domain, "--uri", NAMESPACE, "--key", "sealblk"];
        set.extend(scope);
        let mut metadata = "<disks>".to_owned();
        for name in disks {
            let _ = write!(metadata, "<disk name='{name}'/>");
        }
        metadata.push_str("</disks>");
        match disks.is_empty() {
            true => set.push("--remove"),
            false => set.extend(["--set", &metadata]),
        }
        self.virsh(&set, "").map(drop)
    }
}

/// What is to be known of a domain.
struct Domain {
    disks: BTreeSet<DiskName>,
    devices: Vec<(String, String)>,
    /// Its QEMU, if it runs.
    running: Option<Registered>,
    /// virsh's options for changes of it.
    scope: Vec<&'static str>,
}

impl Attach {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let Self {
            domain,
            name,
            device,
            connection,
        } = self;
        host.disks().definition(&name)?;
        let found = connection.domain(&domain)?;
        let socket = Sockets::of(&name).front_end.display().to_string();
        let occupied = found
            .devices
            .iter()
            .find(|(path, target)| *path == socket || *target == device.target);
        if let Some((_, target)) = occupied {
            return Err(Failure::Attached {
                domain,
                target: target.clone(),
            });
        }
        let disks: BTreeSet<_> = found.disks.iter().cloned().chain([name.clone()]).collect();
        // A name too many starts a disk too many, and does no harm.
        connection.set_disks(&domain, &found.scope, &disks)?;
        // QEMUs of all domains may run as one user: from now on the disk accepts this domain's alone.
        let is_new = host.disks().accept_only_registered(&name)?;
        let attach = || {
            if let Some(running) = &found.running {
                register(&name, running)?;
                units::reload();
                // A process that was started before accepts any.
                units::order(if is_new { "restart" } else { "start" }, &name)?;
            }
            let mut attach = vec!["attach-device", &domain, "/dev/stdin"];
            attach.extend(&found.scope);
            connection.virsh(&attach, &device.element(&name))
        };
        attach().inspect_err(|_| {
            let _ = connection.set_disks(&domain, &found.scope, &found.disks);
        })?;
        output::print(&format!("{domain}: {name} is attached as {}\n", device.target))
    }
}

impl Detach {
    fn run(self) -> Result<(), Failure> {
        let Self {
            domain,
            name,
            connection,
        } = self;
        let found = connection.domain(&domain)?;
        let socket = Sockets::of(&name).front_end.display().to_string();
        let Some((_, target)) = found.devices.iter().find(|(path, _)| *path == socket) else {
            return Err(Failure::NotAttached { domain, name });
        };
        let mut detach = vec!["detach-device", &domain, "/dev/stdin"];
        detach.extend(&found.scope);
        connection.virsh(&detach, &element(&name, target, 1))?;
        let mut disks = found.disks;
        disks.remove(&name);
        connection.set_disks(&domain, &found.scope, &disks)?;
        if found.running.is_some() {
            unregister(&name);
            units::order("stop", &name)?;
        }
        output::print(&format!("{domain}: {name} is detached\n"))
    }
}

impl Undefine {
    fn run(self, host: &Host) -> Result<(), Failure> {
        let Self {
            domain,
            force,
            connection,
            options,
        } = self;
        let found = connection.domain(&domain)?;
        let mut undefine = vec!["undefine", &domain];
        undefine.extend(options.iter().map(String::as_str));
        connection.virsh(&undefine, "")?;
        for name in found.disks {
            if found.running.is_none() {
                units::order("stop", &name)?;
            }
            super::define::undefine(host, &name, force)?;
            output::print::<Failure>(&format!("{name}: undefined; the disk stays\n"))?;
        }
        Ok(())
    }
}

impl Hook {
    /// Fails only where libvirt is to give up what it has begun.
    fn run(self, disks: &Disks) -> Result<(), Failure> {
        let (operation, part) = (
            self.operation.as_str(),
            self.rest.first().map_or("", String::as_str),
        );
        if !matches!(
            (operation, part),
            ("prepare" | "migrate" | "release", "begin" | "end")
        ) {
            return Ok(());
        }
        let mut xml = String::new();
        let read = io::stdin().take(LONGEST).read_to_string(&mut xml);
        read.map_err(|source| Failure::Look {
            path: "/dev/stdin".into(),
            source,
        })?;
        let names = disks_of(&xml)?;
        let names: Vec<_> = names.iter().filter(|name| disks.has(name)).collect();
        if names.is_empty() {
            return Ok(());
        }
        match operation {
            // The source still has the disks, and libvirt prepares the domain next.
            "migrate" => names
                .into_iter()
                .try_for_each(|name| super::start::note_incoming(name, true)),
            "prepare" => {
                let front_end = registered(&xml)?;
                names.iter().try_for_each(|name| register(name, &front_end))?;
                units::start_within(&names, PATIENCE)
            }
            // The guest has ended here, or has left. systemd sees to the rest.
            _ => {
                for name in &names {
                    let _ = super::start::note_incoming(name, false);
                    unregister(name);
                }
                units::stop_services(&names);
                Ok(())
            }
        }
    }
}

/// The QEMU of a domain, as libvirt starts it.
fn registered(xml: &str) -> Result<Registered, Failure> {
    let document = roxmltree::Document::parse(xml).map_err(|_| Failure::NoDomain)?;
    let domain = document.root_element();
    let label = |models: &[&str]| {
        let mut labels = domain.children().filter(|node| node.has_tag_name("seclabel"));
        let of_model = labels.find(|node| {
            node.attribute("model")
                .is_some_and(|model| models.contains(&model))
        })?;
        let label = of_model.children().find(|node| node.has_tag_name("label"))?;
        Some(label.text()?.trim().to_owned())
    };
    // As +64055:+994; a name is not looked up.
    let user = label(&["dac"]).and_then(|label| label.strip_prefix('+')?.split(':').next()?.parse().ok());
    Ok(Registered {
        user,
        label: label(&["apparmor", "selinux"]),
        machine: domain
            .attribute("id")
            .filter(|_| machines_have_groups())
            .map(|id| format!("qemu-{id}")),
    })
}

/// Whether libvirt gives each machine a control group: not where no controller is to be had (its virCgroupAvailable).
fn machines_have_groups() -> bool {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    controllers.is_ok_and(|controllers| !controllers.trim().is_empty())
        || ["cpu", "memory", "devices"]
            .iter()
            .any(|name| Path::new("/sys/fs/cgroup").join(name).is_dir())
}

/// Has a disk accept this front-end and no other.
fn register(name: &DiskName, front_end: &Registered) -> Result<(), Failure> {
    let sockets = Sockets::of(name);
    let path = sockets.peer();
    let write = || {
        super::start::make(&sockets.directory)?;
        private_file::replace(&path, &serde_json::to_vec(front_end)?)?;
        // It is no secret, and the disk's user reads it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
    };
    write().map_err(|source| Failure::Make {
        path: path.clone(),
        source,
    })
}

/// Has it accept none.
fn unregister(name: &DiskName) {
    let _ = fs::remove_file(Sockets::of(name).peer());
}

/// The disks that a domain names in its metadata.
fn disks_of(xml: &str) -> Result<BTreeSet<DiskName>, Failure> {
    let document = roxmltree::Document::parse(xml).map_err(|_| Failure::NoDomain)?;
    let mut names = BTreeSet::new();
    for disk in document
        .descendants()
        .filter(|node| node.has_tag_name((NAMESPACE, "disk")))
    {
        let name = disk.attribute("name").unwrap_or_default();
        names.insert(name.parse().map_err(|_| Failure::NoDomain)?);
    }
    Ok(names)
}

/// The sockets and the targets of its vhost-user disks, and the targets of its others.
fn devices_of(xml: &str) -> Result<Vec<(String, String)>, Failure> {
    let document = roxmltree::Document::parse(xml).map_err(|_| Failure::NoDomain)?;
    let devices = document.descendants().filter(|node| node.has_tag_name("disk"));
    let devices = devices.filter_map(|disk| {
        let part = |tag: &str, attribute: &str| {
            let part = disk.children().find(|child| child.has_tag_name(tag));
            Some(part?.attribute(attribute)?.to_owned())
        };
        Some((part("source", "path").unwrap_or_default(), part("target", "dev")?))
    });
    Ok(devices.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm' id='3'><name>vm7</name><metadata>\
        <sealblk:disks xmlns:sealblk='urn:sealblk:libvirt:1'><sealblk:disk name='vm7'/><sealblk:disk name='vm7-data'/></sealblk:disks>\
        <other:disk xmlns:other='urn:other' name='x'/></metadata>\
        <devices><disk type='vhostuser'><source type='unix' path='/run/sealblk/vm7/disk.sock'/><target dev='vda'/></disk>\
        <disk type='file'><target dev='sda'/></disk></devices></domain>";

    #[test]
    fn a_domain_names_its_disks() {
        let names: Vec<_> = disks_of(DOMAIN)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(names, ["vm7", "vm7-data"]);
        let devices = devices_of(DOMAIN).unwrap();
        assert_eq!(
            devices[0],
            ("/run/sealblk/vm7/disk.sock".to_owned(), "vda".to_owned())
        );
        assert_eq!(devices[1].1, "sda");
        assert!(disks_of("<domain/>").unwrap().is_empty());
        for wrong in ["", "<domain>", &DOMAIN.replace("'vm7-data'", "'../etc'")] {
            disks_of(wrong).unwrap_err();
        }
    }

    #[test]
    fn an_element_is_xml_that_leads_to_the_disk() {
        let element = element(&"vm7".parse().unwrap(), "vdb", 4);
        let devices = devices_of(&format!("<domain>{element}</domain>")).unwrap();
        assert_eq!(
            devices,
            [("/run/sealblk/vm7/disk.sock".to_owned(), "vdb".to_owned())]
        );
    }
}
