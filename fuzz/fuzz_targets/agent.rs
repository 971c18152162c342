//! Callers of the agent's socket that say anything: `ci/campaign fuzz`. See `src/agent/hostile.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sealblk::agent::hostile::calls(input));
