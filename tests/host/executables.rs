//! The two executables, `sealblk` and `vhost-user-sealblk`, start each other, wherever an operator or a package has put them.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::serve::{Server, sealblk_path, serve};
use common::volume::{Volume, run};

const SERVER: &str = "vhost-user-sealblk";

/// Copies the executable `name` to `directory`.
fn put(name: &str, directory: &Path) -> PathBuf {
    fs::create_dir_all(directory).unwrap();
    // By another process: while this one writes a file, one that it starts meanwhile keeps the file from being executed.
    let copy = directory.join(name);
    run(Command::new("cp")
        .arg(Path::new(sealblk_path()).with_file_name(name))
        .arg(&copy));
    copy
}

/// The arguments of a server, for another executable than that of the tests.
fn serving(executable: &Path, volume: &Volume, socket: &Path) -> Command {
    let usual = serve(volume, socket, &[]);
    let verb = usize::from(executable.ends_with(SERVER));
    let mut command = Command::new(executable);
    command.args(usual.get_args().skip(verb));
    command
}

#[test]
fn executables_find_each_other_side_by_side_and_as_packages_place_them() {
    for (command, server) in [("one", "one"), ("usr/bin", "usr/libexec")] {
        let volume = Volume::new();
        let command = put("sealblk", &volume.beside(command));
        let server = put(SERVER, &volume.beside(server));
        for executable in [command, server] {
            let socket = volume.beside("socket");
            let server = Server::at(&mut serving(&executable, &volume, &socket), socket);
            server.process.wait_stderr("serving");
            server.still_serves();
        }
    }
}

#[test]
fn executable_that_is_missing_or_another_by_its_name_is_told() {
    let volume = Volume::new();
    let socket = volume.beside("socket");
    let ended = |executable: &Path| -> (Output, String) {
        let output = serving(executable, &volume, &socket).output().unwrap();
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        (output, said)
    };
    let alone = put("sealblk", &volume.beside("alone"));
    let (output, said) = ended(&alone);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot find the executable vhost-user-sealblk"),
        "{said}"
    );
    // Seen from another directory than `bin`, `libexec` is not a package's.
    put(SERVER, &volume.beside("libexec"));
    assert_eq!(ended(&alone).1, said);
    // A link would execute itself.
    let link = alone.with_file_name(SERVER);
    symlink("sealblk", &link).unwrap();
    assert_eq!(ended(&alone).1, said);
    let (output, said) = ended(&link);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("this is `sealblk` under the name"), "{said}");

    let server = put(SERVER, &volume.beside("server-alone"));
    let (output, said) = ended(&server);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot find the executable sealblk"), "{said}");
}

/// The helper tells `serve` the grants in one message, which has a limit.
#[test]
fn grants_for_thousands_of_other_volumes_keep_no_disk_from_being_served() {
    let volume = Volume::new();
    let mut config = String::new();
    for user in 4_200_000..4_202_000 {
        let uuid = uuid::Uuid::from_u128(user);
        write!(
            config,
            "[[grant]]\nuser = {user}\nprivileges = [\"RegisterVM\"]\nvolumes = [\"{uuid}\"]\n"
        )
        .unwrap();
    }
    let path = volume.beside("config.toml");
    fs::write(&path, config).unwrap();
    let control = volume.beside("control").display().to_string();
    let config = path.display().to_string();
    let server = Server::with(&volume, &["--config", &config, "--control-socket", &control]);
    server.still_serves();
}
