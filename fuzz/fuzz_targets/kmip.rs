//! Answers of KMIP servers: `ci/campaign fuzz`.
//!
//! The first byte of the input is the operation that was asked for, the rest is the answer. What decodes has one encoding, and
//! everything that is ever read of an answer is read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sealblk::providers::kmip::message::Answer;
use sealblk::providers::kmip::ttlv::Item;

fuzz_target!(|input: &[u8]| {
    let Some((operation, message)) = input.split_first() else {
        return;
    };
    if let Ok(item) = Item::decode(message) {
        assert_eq!(*item.encode().unwrap(), *message);
    }
    let parse = || Answer::parse(message, u32::from(*operation));
    let _ = parse().and_then(Answer::wrapped_key);
    if let Ok(answer) = parse() {
        answer.versions();
        let _ = answer.unique_identifier();
        let _ = answer.located();
        let _ = answer.state();
        let _ = answer.identifier();
        let _ = answer.encrypted(32);
        let _ = answer.decrypted();
        let _ = answer.key();
    }
});
