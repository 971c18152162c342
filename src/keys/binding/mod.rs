//! How a LUKS2 volume is bound to KEKs of key providers: sealblk's tokens, which have a keyslot's secret wrapped under a KEK.
//!
//! ```text
//! token      the token in the header
//! unlock     opens a volume by its tokens
//! new        a keyslot and its token, for a KEK
//! create     makes a volume that is bound to a KEK
//! rekey      replaces a KEK by a new one
//! bindings   the KEKs that open a volume, read without a key
//! info       the properties of a volume for people, read without a key
//! ```

mod bindings;
mod create;
mod error;
mod info;
mod new;
mod rekey;
mod token;
mod unlock;

pub use bindings::{Bindings, BoundTo, Proof};
pub use create::{CreateOptions, create};
pub use error::{BindingError, BindingReason};
pub use info::{CopiesInfo, Info, KdfInfo, KeyslotInfo, Purpose, SegmentInfo, TokenInfo};
pub use rekey::{Rekeyed, rekey};
pub use token::is_ours;
pub use unlock::{check_binding, unlock};
