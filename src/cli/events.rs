//! `sealblk events`: prints the events of keys and disks as they occur.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::failure::Failure;
use super::{Host, output, served};
use crate::attachment as disk;
use crate::control::varlink::{CallError, call_for_more, reply};
use crate::control::wire::Connection;
use crate::disks::{DiskName, Sockets};
use crate::keys::protocol;

/// Print events of keys and disks as JSON, one object a line, until you interrupt it
#[derive(Debug, Args)]
pub(super) struct Events {
    #[command(flatten)]
    disk: DiskOrAgent,
}

/// Whose events they are.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct DiskOrAgent {
    /// The name of a served disk (`sealblk define`) [default: the key agent's events]
    #[arg(value_name = "NAME")]
    name: Option<DiskName>,
    /// The control socket of a served disk
    #[arg(long, value_name = "SOCK")]
    control_socket: Option<PathBuf>,
}

impl DiskOrAgent {
    fn socket(self) -> Option<PathBuf> {
        let of_name = self.name.map(|name| Sockets::of(&name).control);
        self.control_socket.or(of_name)
    }
}

#[derive(Deserialize)]
struct Told {
    event: Option<Value>,
}

impl Events {
    pub(super) fn run(self, host: &Host) -> Result<(), Failure> {
        let (socket, interface) = match self.disk.socket() {
            Some(socket) => (socket, disk::INTERFACE),
            None => (host.agent_socket()?, protocol::INTERFACE),
        };
        match print(&socket, interface)? {
            Ended::Reader => Ok(()),
            Ended::Teller(error) => Err(served::failure(&socket, error)),
        }
    }
}

/// How a stream came to its end.
enum Ended {
    /// The reader of standard output is gone.
    Reader,
    /// Nothing more comes.
    Teller(CallError),
}

fn print(socket: &Path, interface: &str) -> Result<Ended, Failure> {
    let connect = || -> Result<Connection, CallError> {
        let mut connection = Connection::to(socket, served::TIMEOUT)?;
        call_for_more(&mut connection, &format!("{interface}.Watch"), json!({}))?;
        connection.wait_for_ever();
        Ok(connection)
    };
    let mut connection = match connect() {
        Ok(connection) => connection,
        Err(error) => return Ok(Ended::Teller(error)),
    };
    loop {
        match reply::<Told>(&mut connection) {
            Ok((Told { event: Some(event) }, _)) => {
                if !output::line::<Failure>(&event.to_string())? {
                    return Ok(Ended::Reader);
                }
            }
            Ok((Told { event: None }, _)) => {}
            Err(error) => return Ok(Ended::Teller(error)),
        }
    }
}
