//! What every provider must do, whatever it is: each runs this suite.

use std::thread;

use sealblk::keys::{Binding, KeyError, KeyId, KeyProvider, KeyReason, KeyState, Revocation};
use sealblk_secmem::arena::SecretBytes;
use uuid::Uuid;

/// Panics at the first promise of [`KeyProvider`] that `provider` does not keep.
pub(crate) fn run(provider: &dyn KeyProvider) {
    provider.check().unwrap();
    keks_are_distinct_and_active(provider);
    secrets_come_back(provider);
    wrapping_hides_the_secret_and_never_repeats(provider);
    every_part_of_the_binding_counts(provider);
    altered_bytes_do_not_unwrap(provider);
    unknown_keys_are_missing(provider);
    revoked_keys_are_used_no_more(provider);
    threads_share_it(provider);
}

fn binding<'a>(provider: &'a dyn KeyProvider, key_id: &'a KeyId) -> Binding<'a> {
    Binding {
        volume: Uuid::from_u128(0x5ea1),
        provider: provider.name(),
        key_id,
        keyslot: 0,
    }
}

#[track_caller]
fn assert_told(provider: &dyn KeyProvider, key_id: &KeyId, error: &KeyError, reasons: &[KeyReason]) {
    assert!(reasons.contains(&error.reason), "{error:?}");
    assert_eq!(error.provider, provider.name());
    assert_eq!(error.key_id.as_ref(), Some(key_id));
    assert!(!error.hop.is_empty());
}

fn keks_are_distinct_and_active(provider: &dyn KeyProvider) {
    let (one, two) = (provider.create_kek().unwrap(), provider.create_kek().unwrap());
    assert_ne!(one, two);
    assert_eq!(provider.state(&one).unwrap(), KeyState::Active);
    assert_eq!(provider.state(&two).unwrap(), KeyState::Active);
}

fn secrets_come_back(provider: &dyn KeyProvider) {
    let key_id = provider.create_kek().unwrap();
    for len in [1, 16, 32, 64, 512] {
        let secret = SecretBytes::random(len).unwrap();
        let wrapped = provider.wrap(&binding(provider, &key_id), &secret).unwrap();
        assert!(
            provider
                .unwrap(&binding(provider, &key_id), &wrapped)
                .unwrap()
                .ct_eq(&secret)
        );
    }
}

fn wrapping_hides_the_secret_and_never_repeats(provider: &dyn KeyProvider) {
    let key_id = provider.create_kek().unwrap();
    let secret = SecretBytes::random(32).unwrap();
    let one = provider.wrap(&binding(provider, &key_id), &secret).unwrap();
    let two = provider.wrap(&binding(provider, &key_id), &secret).unwrap();
    assert_ne!(one, two);
    assert!(!one.windows(8).any(|window| *window == secret[..8]));
}

fn every_part_of_the_binding_counts(provider: &dyn KeyProvider) {
    let (key_id, other) = (provider.create_kek().unwrap(), provider.create_kek().unwrap());
    let made_for = binding(provider, &key_id);
    let wrapped = provider
        .wrap(&made_for, &SecretBytes::random(32).unwrap())
        .unwrap();
    let moved = [
        Binding {
            volume: Uuid::from_u128(0x5ea2),
            ..made_for
        },
        Binding {
            provider: "elsewhere",
            ..made_for
        },
        Binding {
            key_id: &other,
            ..made_for
        },
        Binding {
            keyslot: 1,
            ..made_for
        },
    ];
    for binding in moved {
        let error = provider.unwrap(&binding, &wrapped).unwrap_err();
        assert_told(provider, binding.key_id, &error, &[KeyReason::Unauthentic]);
    }
}

fn altered_bytes_do_not_unwrap(provider: &dyn KeyProvider) {
    let key_id = provider.create_kek().unwrap();
    let binding = binding(provider, &key_id);
    let wrapped = provider
        .wrap(&binding, &SecretBytes::random(32).unwrap())
        .unwrap();
    let refused = |bytes: &[u8]| {
        let error = provider.unwrap(&binding, bytes).unwrap_err();
        assert_told(provider, &key_id, &error, &[KeyReason::Unauthentic]);
    };
    for at in 0..wrapped.len() {
        let mut altered = wrapped.clone();
        altered[at] ^= 1;
        refused(&altered);
        refused(&wrapped[..at]);
    }
    refused(&[wrapped.as_slice(), &[0]].concat());
    refused(&vec![0xff; 1 << 16]);
}

fn unknown_keys_are_missing(provider: &dyn KeyProvider) {
    let real = provider.create_kek().unwrap();
    let wrapped = provider
        .wrap(&binding(provider, &real), &SecretBytes::random(32).unwrap())
        .unwrap();
    let foreign = [
        String::new(),
        "\0".into(),
        "../../etc/passwd".into(),
        "ключ".into(),
        "k".repeat(1 << 16),
    ];
    for key_id in foreign.map(KeyId) {
        assert_eq!(provider.state(&key_id).unwrap(), KeyState::Missing);
        let binding = binding(provider, &key_id);
        let error = provider.unwrap(&binding, &wrapped).unwrap_err();
        assert_told(provider, &key_id, &error, &[KeyReason::Missing]);
        let error = provider
            .wrap(&binding, &SecretBytes::random(32).unwrap())
            .unwrap_err();
        assert_told(provider, &key_id, &error, &[KeyReason::Missing]);
    }
}

fn revoked_keys_are_used_no_more(provider: &dyn KeyProvider) {
    let (revoked, other) = (provider.create_kek().unwrap(), provider.create_kek().unwrap());
    let secret = SecretBytes::random(32).unwrap();
    let wrapped = provider.wrap(&binding(provider, &revoked), &secret).unwrap();
    // No volume needs it: a list of volumes would keep the key.
    provider.settle(&binding(provider, &revoked), false).unwrap();
    provider.revoke(&revoked, Revocation::Deactivate).unwrap();
    // Once more is no error.
    provider.revoke(&revoked, Revocation::Deactivate).unwrap();
    assert_eq!(provider.state(&revoked).unwrap(), KeyState::Revoked);
    let binding_of = |key_id| binding(provider, key_id);
    for error in [
        provider.unwrap(&binding_of(&revoked), &wrapped).unwrap_err(),
        provider.wrap(&binding_of(&revoked), &secret).unwrap_err(),
    ] {
        assert_told(provider, &revoked, &error, &[KeyReason::NotActive]);
    }
    provider.wrap(&binding_of(&other), &secret).unwrap();
    let missing = provider.revoke(&KeyId("no such key".into()), Revocation::Deactivate);
    assert_eq!(missing.unwrap_err().reason, KeyReason::Missing);
}

fn threads_share_it(provider: &dyn KeyProvider) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| secrets_come_back(provider));
        }
    });
}
