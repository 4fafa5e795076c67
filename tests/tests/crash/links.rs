//! The network between two parties fails in every way there is, on every link there is, under
//! load and with two message services: what was told to a merchant is what happened, and all is
//! finished soon after.

use std::time::{Duration, Instant};

use handfast_fail_points::Point;
use handfast_tests::proxy::{Proxy, Way};
use handfast_tests::{Engines, Floor, Link, Merchants, Party, World, eventually};

use crate::every_point::each_of;
use crate::two_replicas::REPLICA;

/// Worlds at the same time.
const WORLDS: usize = 4;
/// How long what does not end by itself goes on.
const FAULT: Duration = Duration::from_secs(2);
/// Between two things that happen at once.
const BEAT: Duration = Duration::from_millis(100);
/// After one fault, and for what has another way also during it, everything is finished within
/// this time.
const FINISHED: Duration = Duration::from_secs(60);

/// The end of the message by which a client of PostgreSQL asks to commit, and of no other: BEGIN
/// names `READ COMMITTED`, and a verdict is `COMMITTED`.
const COMMIT: &[u8] = b"COMMIT\0";

/// What the network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing that goes this way arrives, until the connections are reset.
    BlackHole(Way),
    /// The connections are reset once.
    Reset,
    /// The connections are closed, and new ones refused.
    Refused,
    /// The connections are reset again and again.
    Flapping,
    /// Requests arrive, and connections end before their replies, again and again.
    LostReplies,
    /// As that, and only for what asks to commit a transaction.
    LostCommits,
    /// All comes late.
    Delay,
    /// This way is closed in good order, the other one goes on.
    HalfClosed(Way),
}

const FAULTS: [Fault; 10] = [
    Fault::BlackHole(Way::There),
    Fault::BlackHole(Way::Back),
    Fault::Reset,
    Fault::Refused,
    Fault::Flapping,
    Fault::LostReplies,
    Fault::LostCommits,
    Fault::Delay,
    Fault::HalfClosed(Way::There),
    Fault::HalfClosed(Way::Back),
];

#[tokio::test]
async fn whatever_happens_on_a_link_what_was_told_is_what_happened() {
    each_of(Link::ALL.to_vec(), WORLDS, fails).await;
}

async fn fails(link: Link) {
    let mut world = World::new(Engines::Production).await;
    world.replicated = true;
    let proxy = world.proxy(link).await;
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    if link == Link::Status {
        // Else nobody is asked.
        let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
        world.start_armed(Party::Payment, &lose).await;
    }
    world.start_all().await;
    let merchants = Merchants::of(world.payments());
    // What the others send over their links has no word for it.
    let commits = matches!(link, Link::Business | Link::Effects);
    let wanted = |fault: &Fault| commits || *fault != Fault::LostCommits;
    for fault in FAULTS.into_iter().filter(wanted) {
        let name = format!("{link:?} {fault:?}");
        let unharmed = proxy.harmed();
        let suffering = suffers(&world, &merchants, (link, &proxy), fault);
        let (over, ()) = tokio::join!(suffering, merchants.ask(&name));
        // Whoever asked has been told by now, or has gone away.
        world.drained_within(FINISHED).await;
        let took = over.elapsed();
        let harmed = proxy.harmed() - unharmed;
        eprintln!("{link:?}, {fault:?}: {harmed} times, finished after {took:?}");
        assert!(harmed > 0, "{link:?} did not meet {fault:?}");
    }
    let books = world.drained().await;
    let history = merchants.into_history();
    let told = history.outcomes();
    eprintln!("{link:?}: {told:?}, {} repeats", books.repeats());
    history.agrees_with(&books);
    let confirmed_by_check = if link == Link::Status { 200 } else { 0 };
    books.hold(Floor {
        paid: 200,
        refused: 50,
        confirmed_by_check,
        ..Floor::default()
    });
    assert!(told.ok >= 100 && told.failed >= 25, "{told:?}");
    if link == Link::Business {
        assert!(told.unknown > 0, "nobody was left without an answer");
    }
}

/// The fault comes and goes. Returns when it went.
async fn suffers(
    world: &World,
    merchants: &Merchants,
    (link, proxy): (Link, &Proxy),
    fault: Fault,
) -> Instant {
    let before = proxy.carried(Way::Back);
    eventually(format!("{link:?} is in use"), FINISHED, async || {
        let carried = proxy.carried(Way::Back);
        (carried > before)
            .then_some(())
            .ok_or_else(|| "nothing comes back on it".to_owned())
    })
    .await;
    match fault {
        Fault::BlackHole(way) => proxy.swallows(way, true),
        Fault::Reset => proxy.resets(),
        Fault::Refused => {
            proxy.refuses(true);
            proxy.cuts();
        }
        Fault::Flapping => beats(|| proxy.resets()).await,
        Fault::LostReplies => beats(|| proxy.cuts_before_the_next_reply()).await,
        Fault::LostCommits => proxy.cuts_before_replies_to(Some(COMMIT)),
        Fault::Delay => proxy.delays(BEAT),
        Fault::HalfClosed(way) => proxy.half_closes(way, true),
    }
    tokio::time::sleep(FAULT).await;
    merchants.stop();
    // Who has another way to go does not wait for the mend.
    if matches!(link, Link::Messages | Link::Store | Link::Broker) {
        world.drained_within(FINISHED).await;
    }
    match fault {
        Fault::BlackHole(way) => {
            proxy.swallows(way, false);
            proxy.resets();
        }
        Fault::Refused => proxy.refuses(false),
        Fault::LostCommits => proxy.cuts_before_replies_to(None),
        Fault::Delay => proxy.delays(Duration::ZERO),
        Fault::HalfClosed(way) => {
            proxy.half_closes(way, false);
            proxy.cuts();
        }
        Fault::LostReplies => proxy.spares_the_next_reply(),
        Fault::Reset | Fault::Flapping => {}
    }
    Instant::now()
}

/// Does it ten times.
async fn beats(mut happens: impl FnMut()) {
    for _ in 0..10 {
        happens();
        tokio::time::sleep(BEAT).await;
    }
}
