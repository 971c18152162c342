//! The KMIP provider with servers that do what PyKMIP does not: those that are hostile or broken, and those that keep to the
//! protocol and accept or refuse what PyKMIP never would.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use sealblk::keys::{KeyId, KeyReason};
use sealblk::providers::{kmip::Settings, kmip::Wrap, kmip::WrappingKey};
use sealblk::providers::{
    kmip::message::Request, kmip::message::Use, kmip::message::VERSIONS, kmip::message::Version,
    kmip::message::tag,
};
use sealblk::providers::{kmip::ttlv::Item, kmip::ttlv::Tag, kmip::ttlv::Value};

use crate::kmip::{assert_fails, causes, open, wrap};
use crate::mock::{Mock, Stream};
use crate::pykmip::{Server, encoded, settings};

const CREATE: u32 = 0x01;
const LOCATE: u32 = 0x08;
const GET: u32 = 0x0a;
const GET_ATTRIBUTES: u32 = 0x0b;
const ADD_ATTRIBUTE: u32 = 0x0d;
const ACTIVATE: u32 = 0x12;
const REVOKE: u32 = 0x13;
const DESTROY: u32 = 0x14;
const DISCOVER_VERSIONS: u32 = 0x1e;
const ENCRYPT: u32 = 0x1f;

const OPERATION_NOT_SUPPORTED: u32 = 0x05;

/// 32 bytes of 7 under 32 bytes of 1, by python-cryptography's `aes_key_wrap`.
const WRAPPED: &[u8; 40] = &[
    0x53, 0xb8, 0x51, 0x62, 0xbb, 0xb0, 0xf2, 0xb3, 0xdd, 0xa9, 0x24, 0xa9, 0xc7, 0x9d, 0x5f, 0x6a, 0xa0,
    0xd1, 0xcf, 0x0b, 0x38, 0x51, 0x77, 0xcd, 0x7e, 0x4c, 0x84, 0xa8, 0xf5, 0x92, 0x94, 0xaf, 0xcd, 0x23,
    0x92, 0x7b, 0x03, 0xec, 0x8a, 0xb6,
];

#[test]
fn server_that_does_not_answer_leaves_time_for_the_second_and_is_not_asked_first_again() {
    let second = Server::start();
    let silent = Mock::start(|_| thread::sleep(Duration::from_secs(60)));
    let provider = open(&Settings {
        timeout: 8,
        ..settings(&[silent.address(), second.address()])
    });
    let started = Instant::now();
    let key_id = provider.create_kek().unwrap();
    let first = started.elapsed();
    assert!(
        first >= Duration::from_secs(4) && first < Duration::from_secs(8),
        "{first:?}"
    );
    let started = Instant::now();
    wrap(&*provider, &key_id).unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn hostile_answers_are_garbled_and_nothing_worse() {
    let header = "42007b01";
    let answers: [(Vec<u8>, &str); 9] = [
        (bytes("42"), "ends too early"),
        (bytes(header), "ends too early"),
        (bytes(&format!("{header} 00000010 42000f01")), "ends too early"),
        (bytes(&format!("{header} 7ffffff8")), "2147483640 bytes long"),
        (
            bytes(&format!("{header} 00000004 00000000")),
            "is not a KMIP message",
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            "is not a KMIP message",
        ),
        (bytes(&format!("{header} 00000000")), "lacks the item 42000f"),
        // A text that is none.
        (
            bytes(&format!("{header} 00000010 42000f 07 00000002 c328000000000000")),
            "makes no sense",
        ),
        // Structures in structures, to the limit of an answer.
        (nested(16 << 10), "more than 16 deep"),
    ];
    for (answer, cause) in answers {
        let sent = answer.clone();
        let server = Mock::start(move |stream| {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(&sent);
        });
        let result = open(&settings(&[server.address()])).create_kek();
        assert_fails(result, KeyReason::Garbled, cause);
    }
}

#[test]
fn server_that_closes_without_an_answer_is_not_there() {
    let server = Mock::start(|stream| drop(stream.read(&mut [0; 1024])));
    let result = open(&settings(&[server.address()])).create_kek();
    assert_fails(result, KeyReason::Unreachable, "closed the connection");
}

#[test]
fn slow_server_is_not_waited_for_beyond_the_deadline() {
    // It says something twice a second, so that no single wait is long.
    let dripping = Mock::start(|stream| {
        let _ = stream.read(&mut [0; 1024]);
        for byte in bytes("42007b01 00001000").into_iter().chain([0; 200]) {
            if stream.write_all(&[byte]).and_then(|()| stream.flush()).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(500));
        }
    });
    let provider = open(&Settings {
        timeout: 2,
        ..settings(&[dripping.address()])
    });
    let started = Instant::now();
    assert_fails(provider.create_kek(), KeyReason::Unreachable, "no answer in time");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn key_has_attributes_of_our_own_where_they_are_accepted() {
    let version = env!("CARGO_PKG_VERSION");
    for (protocol, expected) in [
        (
            (1, 4),
            &[
                "x-Vendor",
                "sealblk",
                "x-Product",
                "sealblk",
                "x-Product_Version",
                version,
            ][..],
        ),
        (
            (2, 1),
            &[
                "x",
                "Vendor",
                "sealblk",
                "x",
                "Product",
                "sealblk",
                "x",
                "Product_Version",
                version,
            ],
        ),
    ] {
        let created = Arc::new(Mutex::new(Vec::new()));
        let seen = created.clone();
        let server = Honest::start(protocol, move |operation, payload| {
            if operation == CREATE {
                collect_texts(payload, &mut seen.lock().unwrap());
            }
            Ok(vec![text(tag::UNIQUE_IDENTIFIER, "key-1")])
        });
        let key_id = open(&settings(&[server.mock.address()])).create_kek().unwrap();
        assert_eq!(key_id, KeyId("key-1".into()));
        let created = created.lock().unwrap();
        assert_eq!(created[created.len() - expected.len()..], *expected);
        assert_eq!(server.operations(), [DISCOVER_VERSIONS, CREATE, ACTIVATE]);
    }
}

/// A server with one key that lets `note` take what it is used for.
fn with_key_noting(
    protocol: (i32, i32),
    note: impl Fn(&[Item<'_>]) -> Outcome + Send + 'static,
) -> (Honest, Settings) {
    let server = Honest::start(protocol, move |operation, payload| match operation {
        GET_ATTRIBUTES if protocol < (2, 0) => Ok(state(2)),
        GET_ATTRIBUTES => Ok(state_item(2)),
        GET => Ok(symmetric_key(1)),
        LOCATE => Ok(vec![text(tag::UNIQUE_IDENTIFIER, "key-1")]),
        ADD_ATTRIBUTE => note(payload),
        _ => Err((OPERATION_NOT_SUPPORTED, "")),
    });
    let settings = settings(&[server.mock.address()]);
    (server, settings)
}

#[test]
fn key_tells_what_it_is_used_for() {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let volume = "00000000-0000-0000-0000-000000000007";
    for (protocol, named) in [
        (
            (1, 4),
            &[&["x-Component"][..], &["x-Name"], &["x-Identifier"]] as &[&[&str]],
        ),
        (
            (2, 1),
            &[&["x", "Component"][..], &["x", "Name"], &["x", "Identifier"]],
        ),
    ] {
        let noted = Arc::new(Mutex::new(Vec::new()));
        let seen = noted.clone();
        let (server, settings) = with_key_noting(protocol, move |payload| {
            collect_texts(payload, &mut seen.lock().unwrap());
            Ok(vec![text(tag::UNIQUE_IDENTIFIER, "key-1")])
        });
        let provider = open(&settings);
        // A check uses a key for nothing.
        provider.check().unwrap();
        assert!(!server.operations().contains(&ADD_ATTRIBUTE));

        wrap(&*provider, &KeyId("key-1".into())).unwrap();
        let contents = ["sealblk", host.trim(), volume];
        let expected: Vec<_> = named
            .iter()
            .zip(contents)
            .flat_map(|(name, content)| [&["key-1"], *name, &[content]].concat())
            .collect();
        assert_eq!(*noted.lock().unwrap(), expected);
    }
}

#[test]
fn key_tells_its_volume_alone_where_own_attributes_are_refused_and_binds_where_all_are() {
    let noted = Arc::new(Mutex::new(Vec::new()));
    let seen = noted.clone();
    let (server, settings) = with_key_noting((1, 4), move |payload| {
        let mut texts = Vec::new();
        collect_texts(payload, &mut texts);
        let custom = texts[1].starts_with("x-");
        seen.lock().unwrap().extend(texts);
        match custom {
            true => Err((0x0c, "")),
            false => Ok(vec![text(tag::UNIQUE_IDENTIFIER, "key-1")]),
        }
    });
    wrap(&*open(&settings), &KeyId("key-1".into())).unwrap();
    let volume = "00000000-0000-0000-0000-000000000007";
    assert_eq!(
        noted.lock().unwrap()[3..],
        ["key-1", "Application Specific Information", "sealblk", volume]
    );
    let asked = server.operations();
    assert_eq!(asked[asked.len() - 2..], [ADD_ATTRIBUTE, ADD_ATTRIBUTE]);

    let (server, settings) = with_key_noting((1, 4), |_| Err((OPERATION_NOT_SUPPORTED, "")));
    wrap(&*open(&settings), &KeyId("key-1".into())).unwrap();
    let asked = server.operations();
    assert_eq!(
        asked.iter().filter(|&&asked| asked == ADD_ATTRIBUTE).count(),
        2,
        "{asked:?}"
    );
}

#[test]
fn binding_does_not_wait_long_for_a_server_that_takes_no_note() {
    let (_server, settings) = with_key_noting((1, 4), |_| {
        thread::sleep(Duration::from_secs(60));
        Err((OPERATION_NOT_SUPPORTED, ""))
    });
    let provider = open(&settings);
    let started = Instant::now();
    wrap(&*provider, &KeyId("key-1".into())).unwrap();
    let took = started.elapsed();
    assert!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(6),
        "{took:?}"
    );
}

/// Another's encoder where there is one; PyKMIP has no attributes of vendors in KMIP 2, so there it is the specification,
/// written out: KMIP 2.1, Add Attribute and Vendor Attribute.
#[test]
fn attributes_are_written_as_others_write_them() {
    let (key, volume) = ("key-1", "a-volume");
    let identifier = Use::Custom {
        name: "x-Identifier",
        content: volume,
    };
    let payload = |attribute, version| {
        let message = Request::AddAttribute { key, attribute }.encode(version).unwrap();
        let message = Item::decode(&message).unwrap();
        let payload = child(child(&message, tag::BATCH_ITEM), tag::REQUEST_PAYLOAD);
        payload.encode().unwrap().to_vec()
    };
    let v2_0 = VERSIONS[1];
    assert_eq!(
        payload(identifier, Version::V1_4),
        bytes(&encoded("1.4", key, volume))
    );
    assert_eq!(
        payload(Use::Application(volume), v2_0),
        bytes(&encoded("2.0", key, volume))
    );
    let vendors = "420079 01 00000058
          420094 07 00000005 6b65792d31 000000
          42013d 01 00000040
            420008 01 00000038
              42009d 07 00000001 78 00000000000000
              42000a 07 0000000a 4964656e746966696572 000000000000
              42000b 07 00000008 612d766f6c756d65";
    assert_eq!(payload(identifier, v2_0), bytes(vendors));
}

#[test]
fn key_that_cannot_be_made_ready_is_not_left_behind() {
    let refusing = |refused| {
        Honest::start((1, 4), move |operation, _| match operation {
            operation if operation == refused => Err((OPERATION_NOT_SUPPORTED, "")),
            _ => Ok(vec![text(tag::UNIQUE_IDENTIFIER, "key-1")]),
        })
    };
    let server = refusing(ACTIVATE);
    let result = open(&settings(&[server.mock.address()])).create_kek();
    assert_fails(
        result,
        KeyReason::Failed,
        "the server refuses Activate: Operation Not Supported",
    );
    assert_eq!(
        server.operations(),
        [DISCOVER_VERSIONS, CREATE, ACTIVATE, DESTROY]
    );

    let server = refusing(ENCRYPT);
    let provider = open(&Settings {
        wrap: Wrap::Server,
        ..settings(&[server.mock.address()])
    });
    assert_fails(
        provider.create_kek(),
        KeyReason::Failed,
        "the server refuses Encrypt",
    );
    assert_eq!(
        server.operations(),
        [DISCOVER_VERSIONS, CREATE, ACTIVATE, ENCRYPT, REVOKE, DESTROY]
    );
}

#[test]
fn refusals_are_told_by_what_to_do_about_them() {
    for (result_reason, reason, shown) in [
        (0x01, KeyReason::Missing, "Item Not Found"),
        (0x36, KeyReason::Missing, "Object Destroyed"),
        (0x37, KeyReason::Missing, "Object Not Found"),
        (0x0d, KeyReason::NotActive, "Object Archived"),
        (0x43, KeyReason::NotActive, "Wrong Key Lifecycle State"),
        (0x03, KeyReason::Refused, "Authentication Not Successful"),
        (0x0c, KeyReason::Refused, "Permission Denied"),
        (0x16, KeyReason::Refused, "Sensitive"),
        (0x17, KeyReason::Refused, "Not Extractable"),
        (0x39, KeyReason::Refused, "Not Authorised"),
        (0x05, KeyReason::Failed, "Operation Not Supported"),
        (0x100, KeyReason::Failed, "General Failure"),
        (0x7777, KeyReason::Failed, "Result Reason 0x7777"),
    ] {
        let server = Honest::start((1, 4), move |operation, _| match operation {
            GET_ATTRIBUTES => Ok(state(2)),
            _ => Err((result_reason, "see\x1b[2Jthe log")),
        });
        let provider = open(&settings(&[server.mock.address()]));
        let error = wrap(&*provider, &KeyId("key-1".into())).unwrap_err();
        let causes = causes(&error);
        assert_eq!(error.reason, reason, "{causes}");
        // Nothing of what a server says reaches a terminal as a control character.
        assert!(
            causes.contains(&format!("the server refuses Get: {shown}: \"see[2Jthe log\"")),
            "{causes}"
        );
    }
}

#[test]
fn answers_that_are_none_to_what_was_asked_are_garbled() {
    let with_answers = |state: Vec<Item<'static>>, key: Vec<Item<'static>>| {
        let server = Honest::start((1, 4), move |operation, _| match operation {
            GET_ATTRIBUTES => Ok(state.clone()),
            GET => Ok(key.clone()),
            _ => Err((OPERATION_NOT_SUPPORTED, "")),
        });
        let provider = open(&settings(&[server.mock.address()]));
        wrap(&*provider, &KeyId("key-1".into()))
    };
    with_answers(state(2), symmetric_key(1)).unwrap();
    for (answers, cause) in [
        (with_answers(state(9), vec![]), "the state 0x9"),
        (with_answers(vec![], vec![]), "lacks the item 42008d"),
        (with_answers(state(2), vec![]), "lacks the item 42008f"),
        // Transparent Symmetric Key: not the format that was asked for.
        (with_answers(state(2), symmetric_key(7)), "lacks the item 420042"),
        (
            with_answers(state(2), wrapped_key(&[7; 40])),
            "but a key in clear was requested",
        ),
    ] {
        assert_fails(answers, KeyReason::Garbled, cause);
    }
}

/// A server, or who has taken its place, must not get a key into use that the wrapping key does not vouch for.
#[test]
fn keys_that_were_to_come_wrapped_and_did_not_are_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wrapping.key");
    std::fs::write(&file, [1; 32]).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let with_answer = |key: Vec<Item<'static>>| {
        let server = Honest::start((1, 4), move |operation, _| match operation {
            GET_ATTRIBUTES => Ok(state(2)),
            GET => Ok(key.clone()),
            _ => Err((OPERATION_NOT_SUPPORTED, "")),
        });
        let provider = open(&Settings {
            wrapping_key: Some(WrappingKey {
                id: "wrapping-1".into(),
                file: file.clone(),
            }),
            ..settings(&[server.mock.address()])
        });
        wrap(&*provider, &KeyId("key-1".into()))
    };
    assert_fails(
        with_answer(symmetric_key(1)),
        KeyReason::Garbled,
        "in clear, but a wrapped key was requested",
    );
    let wrapped = *WRAPPED;
    with_answer(wrapped_key(&WRAPPED[..])).unwrap();
    for at in [0, 17, 39] {
        let mut altered = wrapped;
        altered[at] ^= 1;
        let altered: &'static [u8] = Box::leak(Box::new(altered));
        let answer = with_answer(wrapped_key(altered));
        assert_fails(answer, KeyReason::Invalid, "the key cannot be unwrapped");
    }
    for len in [0, 8, 32, 39] {
        let answer = with_answer(wrapped_key(&WRAPPED[..len]));
        assert_fails(answer, KeyReason::Invalid, "the key cannot be unwrapped");
    }
}

fn text(tag: Tag, text: &'static str) -> Item<'static> {
    Item::new(tag, Value::TextString(text))
}

/// A key of AES-256 in this format.
fn symmetric_key(format: u32) -> Vec<Item<'static>> {
    let material = Item::structure(
        tag::KEY_VALUE,
        [Item::new(tag::KEY_MATERIAL, Value::ByteString(&[7; 32]))],
    );
    let format = Item::new(tag::KEY_FORMAT_TYPE, Value::Enumeration(format));
    let block = Item::structure(tag::KEY_BLOCK, [format, material]);
    vec![Item::structure(tag::SYMMETRIC_KEY, [block])]
}

/// A key that was given out wrapped.
fn wrapped_key(wrapped: &'static [u8]) -> Vec<Item<'static>> {
    let material = Item::structure(
        tag::KEY_VALUE,
        [Item::new(tag::KEY_MATERIAL, Value::ByteString(wrapped))],
    );
    let format = Item::new(tag::KEY_FORMAT_TYPE, Value::Enumeration(1));
    let method = Item::new(tag::WRAPPING_METHOD, Value::Enumeration(1));
    let wrapping = Item::structure(tag::KEY_WRAPPING_DATA, [method]);
    let block = Item::structure(tag::KEY_BLOCK, [format, material, wrapping]);
    vec![Item::structure(tag::SYMMETRIC_KEY, [block])]
}

/// The attribute State as KMIP 2.x has it.
fn state_item(state: u32) -> Vec<Item<'static>> {
    let state = Item::new(tag::STATE, Value::Enumeration(state));
    vec![Item::structure(tag::ATTRIBUTES, [state])]
}

/// The attribute State as KMIP 1.x has it.
fn state(state: u32) -> Vec<Item<'static>> {
    let value = Item::new(tag::ATTRIBUTE_VALUE, Value::Enumeration(state));
    vec![Item::structure(
        tag::ATTRIBUTE,
        [text(tag::ATTRIBUTE_NAME, "State"), value],
    )]
}

fn collect_texts(items: &[Item<'_>], texts: &mut Vec<String>) {
    for item in items {
        match &item.value {
            Value::Structure(items) => collect_texts(items, texts),
            Value::TextString(text) => texts.push((*text).to_owned()),
            _ => (),
        }
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// Structures each of which has the next one as its value.
fn nested(len: usize) -> Vec<u8> {
    let structure = |left: usize| [bytes("42007b01"), (left as u32).to_be_bytes().to_vec()].concat();
    (0..=len / 8).flat_map(|at| structure(len - 8 * at)).collect()
}

/// A server that keeps to the protocol.
struct Honest {
    mock: Mock,
    operations: Arc<Mutex<Vec<u32>>>,
}

/// The items of an answer's payload, or Result Reason and Result Message.
type Outcome = Result<Vec<Item<'static>>, (u32, &'static str)>;

impl Honest {
    /// A server of one version that answers as `answer` does to an operation and the items of its payload.
    fn start(version: (i32, i32), answer: impl Fn(u32, &[Item<'_>]) -> Outcome + Send + 'static) -> Self {
        let operations = Arc::new(Mutex::new(Vec::new()));
        let seen = operations.clone();
        let mock = Mock::start(move |stream| {
            while let Some(request) = receive(stream) {
                let request = Item::decode(&request).unwrap();
                let batch_item = child(&request, tag::BATCH_ITEM);
                let Value::Enumeration(operation) = child(batch_item, tag::OPERATION).value else {
                    panic!("{request:?}")
                };
                let Value::Structure(payload) = &child(batch_item, tag::REQUEST_PAYLOAD).value else {
                    panic!("{request:?}")
                };
                seen.lock().unwrap().push(operation);
                let outcome = match operation {
                    DISCOVER_VERSIONS => Ok(vec![protocol_version(version)]),
                    _ => answer(operation, payload),
                };
                let _ = stream.write_all(&response(operation, outcome));
            }
        });
        Self { mock, operations }
    }

    /// Those that were asked for so far.
    fn operations(&self) -> Vec<u32> {
        self.operations.lock().unwrap().clone()
    }
}

fn receive(stream: &mut Stream) -> Option<Vec<u8>> {
    let mut message = vec![0; 8];
    stream.read_exact(&mut message).ok()?;
    let len = u32::from_be_bytes(message[4..].try_into().unwrap()) as usize;
    message.resize(8 + len, 0);
    stream.read_exact(&mut message[8..]).ok()?;
    Some(message)
}

fn child<'i, 'a>(item: &'i Item<'a>, tag: Tag) -> &'i Item<'a> {
    let Value::Structure(items) = &item.value else {
        panic!("{item:?}")
    };
    items.iter().find(|item| item.tag == tag).unwrap()
}

fn protocol_version((major, minor): (i32, i32)) -> Item<'static> {
    Item::structure(
        tag::PROTOCOL_VERSION,
        [
            Item::new(tag::PROTOCOL_VERSION_MAJOR, Value::Integer(major)),
            Item::new(tag::PROTOCOL_VERSION_MINOR, Value::Integer(minor)),
        ],
    )
}

fn response(operation: u32, outcome: Outcome) -> Vec<u8> {
    let status = |status| Item::new(tag::RESULT_STATUS, Value::Enumeration(status));
    let mut items = vec![Item::new(tag::OPERATION, Value::Enumeration(operation))];
    match outcome {
        Ok(payload) => items.extend([status(0), Item::structure(tag::RESPONSE_PAYLOAD, payload)]),
        Err((reason, message)) => items.extend([
            status(1),
            Item::new(tag::RESULT_REASON, Value::Enumeration(reason)),
            text(tag::RESULT_MESSAGE, message),
        ]),
    }
    let batch_item = Item::structure(tag::BATCH_ITEM, items);
    Item::structure(tag::RESPONSE_MESSAGE, [batch_item])
        .encode()
        .unwrap()
        .to_vec()
}
