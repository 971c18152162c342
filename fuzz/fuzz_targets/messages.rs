//! Front-ends that send anything: `ci/campaign fuzz`. See `src/serve/device/hostile/messages.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sealblk::device::hostile::messages(input));
