//! A process is killed at every durable step there is, while two message services share the work:
//! nothing is lost, invented or done twice, and the other one goes on.
//!
//! The list of points is the program's own; what the usual load does not reach is named here.

use std::pin::pin;
use std::time::{Duration, Instant};

use handfast_fail_points::Point;
use handfast_tests::clients::{Payments, Raw, message, orders};
use handfast_tests::{Engines, Floor, Party, World};

use crate::every_point::{each_of, left_to_claim};
use crate::two_replicas::REPLICA;

/// Worlds that are broken at the same time.
const WORLDS: usize = 3;
/// Orders of one round; every fifth is refused.
const ROUND: usize = 25;
const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_process_may_die_at_every_durable_step_beside_another_replica() {
    // What only streams of the service pass: they need the embedded broker, which has one process.
    let reached = |point: &&Point| **point != Point::DELIVER_AFTER_WRITE;
    let points: Vec<_> = Point::ALL.iter().filter(reached).copied().collect();
    each_of(points, WORLDS, dies_at).await;
}

/// Who passes the point.
fn party(point: Point) -> Party {
    match point.party() {
        "service" => Party::Service,
        "producer" => Party::Payment,
        _ => Party::Accounting,
    }
}

async fn dies_at(point: Point) {
    if matches!(
        point,
        Point::CLAIM_BEFORE_COMMIT | Point::CLAIM_AFTER_COMMIT
    ) {
        // A claim that finds nothing passes them, too.
        return left_to_claim(point, Some(REPLICA)).await;
    }
    let dying = party(point);
    let mut world = World::new(Engines::Production).await;
    world.replicated = true;
    world.config = world
        .config
        .clone()
        .server("bucket_s", 1)
        .topic_for_nobody("parcel");
    let mut armed = format!("{point}=abort@1");
    let lose = format!("{}=return", Point::PRODUCER_LOSE_CONFIRM);
    let is_asked = matches!(
        point,
        Point::CLAIM_CHECKS_BEFORE_COMMIT
            | Point::CLAIM_CHECKS_AFTER_COMMIT
            | Point::SETTLE_CHECKS_BEFORE_COMMIT
            | Point::SETTLE_CHECKS_AFTER_COMMIT
    );
    if matches!(
        point,
        Point::PRODUCER_CHECK_BEFORE_COMMIT | Point::PRODUCER_CHECK_AFTER_COMMIT
    ) {
        armed = format!("{armed};{lose}");
    }
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    match point {
        Point::TOPOLOGY_BEFORE_COMMIT | Point::TOPOLOGY_AFTER_COMMIT => {
            // A rolling restart begins with the service, and the newer topology.
            world.stop(Party::Service).await;
            world.config = world.config.clone().publisher("newcomer").topic("novelty");
            world.config.version = 2;
            world.start_armed(dying, &armed).await;
        }
        _ if dying == Party::Service => {
            world.stop(Party::Service).await;
            world.start_armed(dying, &armed).await;
        }
        _ => world.start_armed(dying, &armed).await,
    }
    if is_asked {
        // Confirms are lost, so there is something to ask about.
        world.start_armed(Party::Payment, &lose).await;
    }
    world.start_all().await;
    let sent = matches!(point, Point::SENT_BEFORE_COMMIT | Point::SENT_AFTER_COMMIT);
    if sent {
        // SENT is written only about what is not answered at once.
        world.freeze(Party::Accounting);
    }
    let mut load = Load::default();
    load.until_dead(&mut world, dying, point).await;
    if sent {
        world.thaw(Party::Accounting);
    }
    load.round((world.payments(), world.raw("payment"))).await;
    let orders = load.rounds * ROUND;
    let mut books = world.drained().await;
    books.messages.retain(|m| !load.parcels.contains(&m.id));
    books.hold(Floor {
        paid: orders * 4 / 5,
        refused: orders / 5,
        ..Floor::default()
    });
}

/// What is asked of the world while somebody is to die.
#[derive(Default)]
struct Load {
    rounds: usize,
    /// What was published beside the payments.
    parcels: Vec<Vec<u8>>,
}

impl Load {
    /// Pays and publishes. Both repeat what got no answer.
    async fn round(&mut self, (payments, source): (Payments, Raw)) {
        let orders = orders(&format!("a{}", self.rounds), ROUND);
        self.rounds += 1;
        let parcel = message("parcel");
        self.parcels.push(parcel.id.clone());
        let (paid, ()) = tokio::join!(payments.pay_all(&orders), source.publish(&parcel));
        assert_eq!(paid, (ROUND * 4 / 5, ROUND / 5));
    }

    /// Goes on until the party has died, and starts it again.
    async fn until_dead(&mut self, world: &mut World, dying: Party, point: Point) {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < SOON, "{} lives on", dying.name());
            if matches!(
                point,
                Point::RETURN_BEFORE_COMMIT | Point::RETURN_AFTER_COMMIT
            ) {
                // What it returns is given back.
                world.delete_queue("accounting").await;
            }
            // The round borrows nothing of the world, which changes meanwhile.
            let clients = (world.payments(), world.raw("payment"));
            let mut round = pin!(self.round(clients));
            tokio::select! {
                () = &mut round => continue,
                () = ended(world, dying) => {}
            }
            world.died_at(dying, point).await;
            world.start(dying).await;
            round.await;
            return;
        }
    }
}

/// Returns when the party has died.
async fn ended(world: &mut World, party: Party) {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    while world.runs(party.name()) {
        look.tick().await;
    }
}
