//! Hostile headers: reading one ends with a consistent volume or with an error, and never with a panic. The fuzz target
//! `header`, in `fuzz/`, tests the same with more inputs.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::binary::Copy;
use crate::locked::{Locked, layout, read};
use crate::metadata::{Kdf, Keyslot};
use crate::testing::{COPY, Memory, copy_of, sample};
use sealblk_secmem::arena::SecretBytes;

/// Everything that is done with a header without a key.
fn examine(io: &Memory) -> Option<Locked<'_>> {
    let found = read(io).ok()?;
    let servable = layout(found.header(), io, None).is_ok();
    let opened = Locked::open(io, None);
    assert_eq!(opened.is_ok(), servable, "{:?}", opened.err());
    let locked = opened.ok()?;
    assert!(locked.capacity() > 0 && locked.capacity() <= io.size.get());
    Some(locked)
}

/// Tries a passphrase, where that is cheap.
fn unlock(locked: &Locked<'_>) {
    let cheap = locked
        .header()
        .metadata()
        .keyslots
        .values()
        .all(|slot| match slot {
            Keyslot::Luks2(slot) => match &slot.kdf {
                Kdf::Argon2i(kdf) | Kdf::Argon2id(kdf) => u64::from(kdf.time) * u64::from(kdf.memory) < 4096,
                Kdf::Pbkdf2(kdf) => kdf.iterations < 4096,
                Kdf::Other(_) => true,
            },
            Keyslot::Other(_) => true,
        });
    if cheap {
        // No passphrase opens the sample, and none opens what was made of it.
        assert!(
            locked
                .unlock_with_passphrase(&SecretBytes::zeroed(8).unwrap())
                .is_err()
        );
    }
}

/// Both copies around one JSON text, with right checksums.
fn sealed(json: &[u8]) -> Memory {
    Memory::holding((3, json), (3, json))
}

/// Values that are likely to be taken for something else.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({})),
        Just(json!([])),
        Just(json!(["0"])),
        Just(json!(["0", "0", "1"])),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..64_u32).prop_map(|bit| Value::from(1_u64 << bit)),
        (0..64_u32).prop_map(|bit| Value::from((1_u64 << bit).to_string())),
        any::<u64>().prop_map(|number| Value::from(number.to_string())),
        (0..1_u64 << 16).prop_map(|blocks| Value::from((blocks * 4096).to_string())),
        Just(json!("dynamic")),
        Just(json!("-1")),
        Just(json!("18446744073709551616")),
        Just(json!("luks2")),
        Just(json!("crypt")),
        Just(json!("linear")),
        Just(json!("pbkdf2")),
        Just(json!("argon2i")),
        ".{0,40}".prop_map(Value::from),
    ]
}

/// Every place in `json`, each as the JSON pointer to it.
fn places(json: &Value, at: &str, into: &mut Vec<String>) {
    into.push(at.to_owned());
    match json {
        Value::Object(object) => object
            .iter()
            .for_each(|(key, value)| places(value, &format!("{at}/{key}"), into)),
        Value::Array(array) => array
            .iter()
            .enumerate()
            .for_each(|(i, value)| places(value, &format!("{at}/{i}"), into)),
        _ => {}
    }
}

#[derive(Debug, Clone)]
enum Change {
    Replace(prop::sample::Index, Value),
    /// Puts what is at the first place also at the second, under a new name if that is an object.
    Copy(prop::sample::Index, prop::sample::Index, String),
}

impl Change {
    fn any() -> impl Strategy<Value = Self> {
        let index = any::<prop::sample::Index>;
        prop_oneof![
            3 => (index(), odd_value()).prop_map(|(at, value)| Self::Replace(at, value)),
            1 => (index(), index(), "[0-9]{1,2}|type|flags|integrity|priority")
                .prop_map(|(from, to, name)| Self::Copy(from, to, name)),
        ]
    }

    fn apply(&self, json: &mut Value) {
        let mut all = Vec::new();
        places(json, "", &mut all);
        match self {
            Self::Replace(at, value) => *json.pointer_mut(&all[at.index(all.len())]).unwrap() = value.clone(),
            Self::Copy(from, to, name) => {
                let value = json.pointer(&all[from.index(all.len())]).unwrap().clone();
                match json.pointer_mut(&all[to.index(all.len())]).unwrap() {
                    Value::Object(object) => drop(object.insert(name.clone(), value)),
                    Value::Array(array) => array.push(value),
                    scalar => *scalar = value,
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn no_metadata_make_it_panic(changes in prop::collection::vec(Change::any(), 1..5)) {
        let mut json = sample();
        changes.iter().for_each(|change| change.apply(&mut json));
        let io = sealed(json.to_string().as_bytes());
        if let Some(locked) = examine(&io) {
            unlock(&locked);
        }
    }

    #[test]
    fn no_json_text_makes_it_panic(at in any::<prop::sample::Index>(), with in "\\PC{0,6}", cut in 0..8_usize) {
        let mut text = sample().to_string().into_bytes();
        let at = at.index(text.len());
        let end = (at + cut).min(text.len());
        text.splice(at..end, with.into_bytes());
        examine(&sealed(&text));
    }

    #[test]
    fn no_binary_header_makes_it_panic(changes in prop::collection::vec((0..512_usize, any::<u8>()), 1..6)) {
        let json = sample().to_string();
        let mut front = copy_of(Copy::Primary, 3, json.as_bytes());
        changes.iter().for_each(|&(at, byte)| front[at] = byte);
        // The checksum is made to hold, or all of these would end at it.
        let (start, end) = (448, 480);
        if !changes.iter().any(|&(at, _)| (start..end).contains(&at)) {
            front[start..end].fill(0);
            let sum = crate::hash::Hash::Sha256.digest(&[&front]);
            front[start..end].copy_from_slice(&sum);
        }
        front.extend(copy_of(Copy::Secondary, 3, json.as_bytes()));
        let io = sealed(json.as_bytes());
        *io.front.borrow_mut() = front;
        examine(&io);
    }

    #[test]
    fn no_length_of_the_file_makes_it_panic(size in prop_oneof![0..4 * COPY, any::<u64>()]) {
        let io = sealed(sample().to_string().as_bytes());
        io.size.set(size);
        examine(&io);
    }
}

#[test]
fn the_sample_itself_is_served() {
    let io = Memory::of(&sample());
    assert!(examine(&io).is_some());
    Locked::open(&io, None).unwrap();
}
