//! Callers of a served disk's control socket, key helpers and other processes that say anything: `ci/campaign fuzz`. See `src/serve/hostile.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sealblk::hostile::control(input));
