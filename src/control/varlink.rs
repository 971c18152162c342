//! Calls, replies and errors of varlink (varlink, "Wire Protocol"), and a service that answers them.
//!
//! A connection carries one call at a time; its replies come before the next call is read. A call's errors have names of the
//! interface, and the connection continues after them. A call with `more` can get a stream: a reply for each event.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::events::{Events, Next, Watch};
use super::peer::Peer;
use super::wire::{Connection, WireError};
use sealblk_base::parsing;

/// What every service answers.
const SERVICE: &str = "org.varlink.service";
const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");

#[derive(Debug, Serialize, Deserialize)]
struct Call {
    method: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    /// The caller wants no reply.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    oneway: bool,
    /// The caller takes more than one reply.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    more: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct ReplyMessage {
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Another reply follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    continues: bool,
}

/// An error that a method answers with: its full name, and what it tells.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodError {
    /// Interface and name, as in `org.varlink.service.MethodNotFound`.
    pub name: String,
    /// As the interface describes them.
    pub parameters: Map<String, Value>,
}

impl MethodError {
    /// An error of `interface`.
    pub fn new(interface: &str, name: &str, parameters: impl Serialize) -> Self {
        Self {
            name: format!("{interface}.{name}"),
            parameters: object(parameters),
        }
    }

    /// A parameter that is missing, or is not what it should be.
    pub fn invalid_parameter(parameter: &str) -> Self {
        Self::new(SERVICE, "InvalidParameter", json!({ "parameter": parameter }))
    }
}

impl fmt::Display for MethodError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, Value::Object(self.parameters.clone()))
    }
}

/// What a method answers, and the descriptors beside it.
#[derive(Debug, Default)]
pub struct Reply {
    parameters: Map<String, Value>,
    descriptors: Vec<OwnedFd>,
    watch: Option<Watch>,
}

impl Reply {
    /// An answer of these parameters, which are a JSON object.
    pub fn of(parameters: impl Serialize) -> Self {
        Self {
            parameters: object(parameters),
            ..Self::default()
        }
    }

    /// A stream: a reply without an event at once, so that the caller knows that it misses none, then one for each.
    pub fn stream(watch: Watch) -> Self {
        Self {
            watch: Some(watch),
            ..Self::default()
        }
    }

    /// The same, with one more descriptor.
    pub fn with(mut self, descriptor: OwnedFd) -> Self {
        self.descriptors.push(descriptor);
        self
    }
}

/// A call that is being answered.
#[derive(Debug)]
pub struct Request<'c> {
    parameters: Map<String, Value>,
    /// What came beside the call.
    pub descriptors: Vec<OwnedFd>,
    /// Who calls.
    pub peer: &'c Peer,
    more: bool,
}

impl Request<'_> {
    /// The parameters, as the interface describes them.
    ///
    /// # Errors
    /// `org.varlink.service.InvalidParameter`.
    pub fn parameters<T: DeserializeOwned>(&mut self) -> Result<T, MethodError> {
        let parameters = Value::Object(std::mem::take(&mut self.parameters));
        // What is said of it names a parameter that is missing.
        parsing::json_value(parameters).map_err(|error| MethodError::invalid_parameter(&error.to_string()))
    }

    /// The stream of `events`, for who asked for more than one reply.
    ///
    /// # Errors
    /// `org.varlink.service.ExpectedMore`, and `TooManyWatchers` of `interface`.
    pub fn watch(&self, interface: &str, events: &Events) -> Result<Reply, MethodError> {
        if !self.more {
            return Err(MethodError::new(SERVICE, "ExpectedMore", json!({})));
        }
        let watch = events.watch(self.peer);
        let watch = watch.ok_or_else(|| MethodError::new(interface, "TooManyWatchers", json!({})))?;
        Ok(Reply::stream(watch))
    }
}

/// One interface of a service.
pub trait Interface: Send + Sync {
    /// Its name, as in `org.example.Interface`.
    fn name(&self) -> &'static str;

    /// It in varlink's interface definition language.
    fn description(&self) -> &'static str;

    /// Whether anything was granted to `peer`. Others may ask too, but must not keep these out.
    fn knows(&self, peer: &Peer) -> bool;

    /// Answers a call of `method`, or says that there is no such method by [`None`].
    ///
    /// # Errors
    /// Those of the interface.
    fn call(&self, method: &str, request: Request<'_>) -> Option<Result<Reply, MethodError>>;
}

/// Answers the calls of `peer` to these interfaces until it leaves, sends what is no call, or is silent for too long.
///
/// # Errors
/// What ended the connection other than the caller's leave.
pub fn serve(
    connection: &mut Connection,
    peer: &Peer,
    interfaces: &[&dyn Interface],
) -> Result<(), WireError> {
    while let Some(message) = connection.receive::<Call>()? {
        let call = message.content;
        let request = Request {
            parameters: call.parameters,
            descriptors: message.descriptors,
            peer,
            more: call.more,
        };
        let answer = answer(&call.method, request, interfaces);
        if call.oneway {
            continue;
        }
        let (parameters, error, descriptors) = match answer {
            Ok(Reply {
                watch: Some(watch), ..
            }) => {
                if tell(connection, &watch, interface_of(&call.method))? == Stream::Left {
                    return Ok(());
                }
                continue;
            }
            Ok(answer) => (answer.parameters, None, answer.descriptors),
            Err(refusal) => (refusal.parameters, Some(refusal.name), Vec::new()),
        };
        let reply = ReplyMessage {
            parameters,
            error,
            continues: false,
        };
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        connection.send(&reply, &descriptors)?;
    }
    Ok(())
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    /// The caller has left.
    Left,
    /// The caller was told so.
    Ended,
}

/// How often a caller that hears nothing is looked after.
const LOOK: Duration = Duration::from_millis(if cfg!(fuzzing) { 1 } else { 1000 });

/// Sends events until the caller leaves, or cannot follow.
fn tell(connection: &mut Connection, watch: &Watch, interface: &str) -> Result<Stream, WireError> {
    let event = |event: Option<&Value>| ReplyMessage {
        parameters: event
            .map(|event| object(json!({ "event": event })))
            .unwrap_or_default(),
        error: None,
        continues: true,
    };
    connection.send(&event(None), &[])?;
    loop {
        match watch.next(LOOK) {
            Next::Event(told) => connection.send(&event(Some(&told)), &[])?,
            Next::Quiet if connection.has_ended()? => return Ok(Stream::Left),
            Next::Quiet => {}
            Next::Behind => {
                let lost = ReplyMessage {
                    parameters: Map::new(),
                    error: Some(format!("{interface}.EventsLost")),
                    continues: false,
                };
                connection.send(&lost, &[])?;
                return Ok(Stream::Ended);
            }
        }
    }
}

/// The interface that a method's full name names.
fn interface_of(full_name: &str) -> &str {
    full_name.rsplit_once('.').map_or("", |(interface, _)| interface)
}

fn answer(
    full_name: &str,
    mut request: Request<'_>,
    interfaces: &[&dyn Interface],
) -> Result<Reply, MethodError> {
    let (wanted, method) = full_name
        .rsplit_once('.')
        .ok_or_else(|| MethodError::invalid_parameter("method"))?;
    let not_found = || MethodError::new(SERVICE, "MethodNotFound", json!({ "method": full_name }));
    let find = |name: &str| interfaces.iter().find(|interface| interface.name() == name);
    if let Some(interface) = find(wanted) {
        return interface
            .call(method, request)
            .unwrap_or_else(|| Err(not_found()));
    }
    let names: Vec<_> = std::iter::once(SERVICE)
        .chain(interfaces.iter().map(|interface| interface.name()))
        .collect();
    match (wanted, method) {
        (SERVICE, "GetInfo") => Ok(Reply::of(json!({
            "vendor": "sealblk",
            "product": "sealblk",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": names,
        }))),
        (SERVICE, "GetInterfaceDescription") => {
            #[derive(Deserialize)]
            struct Parameters {
                interface: String,
            }
            let named = request.parameters::<Parameters>()?.interface;
            let description = match (named.as_str(), find(&named)) {
                (SERVICE, _) => SERVICE_DESCRIPTION,
                (_, Some(interface)) => interface.description(),
                (_, None) => {
                    return Err(MethodError::new(
                        SERVICE,
                        "InterfaceNotFound",
                        json!({ "interface": named }),
                    ));
                }
            };
            Ok(Reply::of(json!({ "description": description })))
        }
        (SERVICE, _) => Err(not_found()),
        _ => Err(MethodError::new(
            SERVICE,
            "InterfaceNotFound",
            json!({ "interface": wanted }),
        )),
    }
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The service left instead of answering.
    #[error("the connection ended before the reply")]
    NoAnswer,
    /// The service says no.
    #[error("{0}")]
    Method(MethodError),
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Wire(error.into())
    }
}

/// Calls a method and waits for its answer.
///
/// # Errors
/// [`CallError`]; the connection is good for another call only after [`CallError::Method`].
pub fn call<T: DeserializeOwned>(
    connection: &mut Connection,
    method: &str,
    parameters: impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(T, Vec<OwnedFd>), CallError> {
    begin(connection, method, parameters, descriptors)?;
    reply(connection)
}

/// Calls a method, whose answer [`reply`] waits for.
///
/// # Errors
/// [`CallError`].
pub fn begin(
    connection: &mut Connection,
    method: &str,
    parameters: impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), CallError> {
    let call = Call {
        method: method.to_owned(),
        parameters: object(parameters),
        oneway: false,
        more: false,
    };
    Ok(connection.send(&call, descriptors)?)
}

/// Calls a method that answers with a stream. The replies are taken with [`reply`]; the connection is for nothing else.
///
/// # Errors
/// [`CallError`].
pub fn call_for_more(
    connection: &mut Connection,
    method: &str,
    parameters: impl Serialize,
) -> Result<(), CallError> {
    let call = Call {
        method: method.to_owned(),
        parameters: object(parameters),
        oneway: false,
        more: true,
    };
    Ok(connection.send(&call, &[])?)
}

/// Waits for the next reply.
///
/// # Errors
/// As for [`call`].
pub fn reply<T: DeserializeOwned>(connection: &mut Connection) -> Result<(T, Vec<OwnedFd>), CallError> {
    let reply = connection.receive::<ReplyMessage>()?.ok_or(CallError::NoAnswer)?;
    let ReplyMessage {
        parameters, error, ..
    } = reply.content;
    match error {
        Some(name) => Err(CallError::Method(MethodError { name, parameters })),
        None => {
            let parameters = parsing::json_value(Value::Object(parameters)).map_err(WireError::Json)?;
            Ok((parameters, reply.descriptors))
        }
    }
}

/// `parameters`, which are a JSON object, as a message carries them.
pub fn object(parameters: impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(parameters) {
        Ok(Value::Object(object)) => object,
        // Whoever waits for them finds them missing. It must not end the process: they may hold what others have chosen.
        Ok(_) => Map::new(),
        Err(error) => {
            tracing::error!(%error, "a message cannot be written as JSON");
            Map::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use sealblk_secmem::arena::SecretBytes;
    use std::os::unix::net::UnixStream;

    /// Gives back what it gets, secrets among it.
    struct Echo;

    impl Interface for Echo {
        fn name(&self) -> &'static str {
            "org.example.Echo"
        }

        fn description(&self) -> &'static str {
            "interface org.example.Echo\n"
        }

        fn knows(&self, _: &Peer) -> bool {
            true
        }

        fn call(&self, method: &str, mut request: Request<'_>) -> Option<Result<Reply, MethodError>> {
            #[derive(Serialize, Deserialize)]
            struct Text {
                text: String,
            }
            match method {
                "Say" => Some(request.parameters::<Text>().map(Reply::of)),
                "Pass" => Some(Ok(Reply::default().with(request.descriptors.remove(0)))),
                "Fail" => Some(Err(MethodError::new(
                    self.name(),
                    "Never",
                    json!({ "why": "because" }),
                ))),
                _ => None,
            }
        }
    }

    fn with_service(work: impl FnOnce(&mut Connection)) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let timeout = Duration::from_secs(10);
        let peer = Peer::of(&theirs).unwrap();
        let service = std::thread::spawn(move || {
            let mut connection = Connection::new(theirs, timeout);
            serve(&mut connection, &peer, &[&Echo])
        });
        let mut connection = Connection::new(ours, timeout);
        work(&mut connection);
        drop(connection);
        service.join().unwrap().unwrap();
    }

    fn error_of(result: Result<(Value, Vec<OwnedFd>), CallError>) -> (String, Value) {
        match result {
            Err(CallError::Method(error)) => (error.name, error.parameters.into()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_are_answered_and_the_connection_outlives_errors() {
        with_service(|connection| {
            let mut call =
                |method: &str, parameters: Value| call::<Value>(connection, method, parameters, &[]);
            assert_eq!(
                call("org.example.Echo.Say", json!({"text": "word"})).unwrap().0,
                json!({"text": "word"})
            );
            let (name, told) = error_of(call("org.example.Echo.Say", json!({"text": 1})));
            assert_eq!(name, "org.varlink.service.InvalidParameter");
            assert!(told["parameter"].as_str().unwrap().contains("string"), "{told}");
            assert_eq!(
                error_of(call("org.example.Echo.Fail", json!({}))),
                ("org.example.Echo.Never".to_owned(), json!({"why": "because"}))
            );
            assert_eq!(
                error_of(call("org.example.Echo.Sing", json!({}))),
                (
                    "org.varlink.service.MethodNotFound".to_owned(),
                    json!({"method": "org.example.Echo.Sing"})
                )
            );
            assert_eq!(
                error_of(call("org.example.Other.Say", json!({}))).0,
                "org.varlink.service.InterfaceNotFound"
            );
            assert_eq!(
                error_of(call("nothing", json!({}))).0,
                "org.varlink.service.InvalidParameter"
            );
            let (info, _) = call("org.varlink.service.GetInfo", json!({})).unwrap();
            assert_eq!(
                info["interfaces"],
                json!(["org.varlink.service", "org.example.Echo"])
            );
            let described = json!({"interface": "org.example.Echo"});
            let (description, _) = call("org.varlink.service.GetInterfaceDescription", described).unwrap();
            assert_eq!(description["description"], "interface org.example.Echo\n");
        });
    }

    #[test]
    fn secrets_go_beside_calls_and_answers() {
        with_service(|connection| {
            let secret = SecretBytes::random(64).unwrap();
            let pipe = wire::pass(&secret).unwrap();
            let (_, back) =
                call::<Value>(connection, "org.example.Echo.Pass", json!({}), &[pipe.as_fd()]).unwrap();
            assert!(wire::take(&back[0]).unwrap().ct_eq(&secret));
        });
    }
}
