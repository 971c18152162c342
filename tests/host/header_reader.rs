//! The process that reads headers for the agent: what it has, and what becomes of the agent when it does not answer or is killed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::fuse::Fuse;
use common::process::children_of;
use common::secrets::{Search, readable_memory};
use common::volume::run;
use rustix::process::{Pid, Signal, kill_process};
use sealblk::keys::{Binding, Providers, RequestPurpose};
use sealblk_secmem::arena::SecretBytes;
use serde_json::Value;
use uuid::Uuid;

/// An agent that has a disk on its list, and a file of a FUSE file system.
struct Host {
    agent: Agent,
    fuse: Fuse,
}

impl Host {
    /// Nothing if this process may not mount.
    fn new() -> Option<Self> {
        let agent = Agent::new("");
        let Some(fuse) = Fuse::mount() else {
            eprintln!("skipped: no FUSE file system can be mounted here");
            return None;
        };
        run(&mut agent.verb(&["create", "disk", "--size", "1M"]));
        let maker = agent.client(RequestPurpose::Create).at(&fuse.path());
        let provider = maker.provider("native").unwrap();
        let key_id = provider.create_kek().unwrap();
        let binding = Binding {
            volume: Uuid::from_u128(7),
            provider: "native",
            key_id: &key_id,
            keyslot: 0,
        };
        provider
            .wrap(&binding, &SecretBytes::random(32).unwrap())
            .unwrap();
        provider.settle(&binding, true).unwrap();
        Some(Self { agent, fuse })
    }

    /// What the agent says of the disk, and of the file: what it is, and why.
    fn known(&self) -> [(String, String); 2] {
        let mut verb = self
            .agent
            .verb(&["key", "where-used", "--provider", "native", "--json"]);
        let rows: Vec<Value> = serde_json::from_slice(&run(&mut verb).stdout).unwrap();
        let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let by_path: BTreeMap<_, _> = rows.iter().map(|row| (text(row, "path"), row)).collect();
        [self.agent.path("disk"), self.fuse.path()].map(|path| {
            let row = by_path[path.to_str().unwrap()];
            (text(row, "standing"), text(row, "why"))
        })
    }

    fn readers(&self) -> Vec<u32> {
        children_of(self.agent.child.id())
    }

    /// Waits until there are so many.
    #[track_caller]
    fn wait_for_readers(&self, number: usize) -> Vec<u32> {
        wait_until(|| Some(self.readers()).filter(|readers| readers.len() == number))
    }
}

#[track_caller]
fn wait_until<T>(attempt: impl Fn() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        assert!(started.elapsed() < DEADLINE);
        thread::sleep(Duration::from_millis(10));
    }
}

fn bound() -> (String, String) {
    ("bound".to_owned(), String::new())
}

#[test]
fn a_reader_that_is_killed_costs_one_answer_and_the_agent_serves_on() {
    let Some(host) = Host::new() else { return };
    host.fuse.ignore_all();
    let [disk, file] = thread::scope(|scope| {
        let asked = scope.spawn(|| host.known());
        wait_until(|| host.fuse.is_asked().then_some(()));
        for reader in host.readers() {
            let reader = Pid::from_raw(reader.cast_signed()).unwrap();
            // As a header would that has it do what its program does not.
            kill_process(reader, Signal::ABORT).unwrap();
        }
        host.fuse.answer();
        asked.join().unwrap()
    });
    assert_eq!(disk, bound());
    assert_eq!(file.0, "unknown");
    assert!(file.1.contains("has failed"), "{file:?}");
    let [disk, file] = host.known();
    assert_eq!(disk, bound());
    assert!(!file.1.contains("has failed"), "{file:?}");
    host.wait_for_readers(0);
}

#[test]
fn a_path_that_never_answers_keeps_one_reader_and_no_other_path() {
    let Some(host) = Host::new() else { return };
    host.fuse.ignore_all();
    let mount = host.fuse.path().parent().unwrap().display().to_string();
    let silent = ("unknown".to_owned(), format!("{mount} does not answer"));
    for _ in 0..2 {
        thread::scope(|scope| {
            let askers: Vec<_> = (0..4).map(|_| scope.spawn(|| host.known())).collect();
            for asker in askers {
                assert_eq!(asker.join().unwrap(), [bound(), silent.clone()]);
            }
        });
        host.wait_for_readers(1);
    }
    host.fuse.answer();
    // Nor does one stay that has ended and is not reaped.
    host.wait_for_readers(0);
    let [_, file] = host.known();
    assert!(!file.1.contains("does not answer"), "{file:?}");
}

#[test]
fn a_reader_has_nothing_of_the_agent() {
    let Some(host) = Host::new() else { return };
    host.fuse.ignore_all();
    let reader = thread::scope(|scope| {
        scope.spawn(|| host.known());
        wait_until(|| host.fuse.is_asked().then_some(()));
        host.wait_for_readers(1)[0]
    });
    let proc = |name: &str| Path::new("/proc").join(reader.to_string()).join(name);
    let open = fs::read_dir(proc("fd")).unwrap().map(|entry| {
        let entry = entry.unwrap();
        let file = fs::read_link(entry.path()).unwrap();
        let file = file.to_string_lossy().split(':').next().unwrap().to_owned();
        (entry.file_name().into_string().unwrap(), file)
    });
    let expected = [
        ("0", "socket"),
        ("1", "/dev/null"),
        ("2", "/dev/null"),
        ("3", "socket"),
    ];
    let expected = expected.map(|(number, file)| (number.to_owned(), file.to_owned()));
    assert_eq!(open.collect::<BTreeMap<_, _>>(), expected.into());
    assert_eq!(fs::read(proc("environ")).unwrap(), b"");

    let status = fs::read_to_string(proc("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in {status}")).trim()
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    // CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: it reads what the agent would.
    for set in ["CapInh:", "CapPrm:", "CapEff:"] {
        assert_eq!(u64::from_str_radix(field(set), 16).unwrap() & !0b110, 0, "{set}");
    }
    let limits = fs::read_to_string(proc("limits")).unwrap();
    for limit in ["Max file size", "Max processes"] {
        let line = limits.lines().find_map(|line| line.strip_prefix(limit)).unwrap();
        assert_eq!(line.split_whitespace().next(), Some("0"), "{limit}");
    }

    let primary = fs::read(host.agent.path("state/providers/native/primary.key")).unwrap();
    let search = Search::default().key("primary key", &primary[16..48]);
    search.assert_absent(&readable_memory(reader), "the memory of the reader");
}

// A thread that the kernel has wait kept the agent's process until the answer came.
#[test]
fn the_agent_ends_while_a_path_does_not_answer_and_its_reader_ends_with_it() {
    let Some(mut host) = Host::new() else { return };
    host.fuse.ignore_all();
    assert_eq!(host.known()[1].0, "unknown");
    let reader = host.wait_for_readers(1)[0];
    host.agent.stop();
    host.fuse.answer();
    let stat = format!("/proc/{reader}/stat");
    wait_until(|| match fs::read_to_string(&stat) {
        Ok(stat) if !stat.contains(") Z ") => None,
        _ => Some(()),
    });
}
